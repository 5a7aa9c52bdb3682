"""JSON from outside: the same value as any parser makes of it, or a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mnemoc.errors import BadInput
from mnemoc.runtime.server.bodies import MOST_BARE_BYTES, MOST_SHOWN, SLICE_BYTES, parse
from mnemoc.runtime.server.problems import Problem
from pydantic_core import from_json

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.lists(st.integers(-(10**20), 10**20), max_size=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS | NUMBERS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


def plain(value: Any) -> Any:
    """With lists in place of tuples."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
@example({"prompt": "not [1, 2, 3] a list \\", "ids": [7] * 99}, False, None)
def test_a_value_comes_back_from_its_json(value: Any, ascii: bool, indent: int | None) -> None:
    assert plain(parse(json.dumps(value, ensure_ascii=ascii, indent=indent).encode())) == value


@given(VALUES, st.data())
def test_damaged_json_is_refused_where_every_parser_refuses_it(value: Any, data: Any) -> None:
    raw = bytearray(json.dumps([value, {"prompt": list(range(40))}]).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b",", b"[", b"]", b'"', b"\\", b"1", b"\xff", b"."])
        )
    try:
        expected = from_json(bytes(raw), allow_inf_nan=False)
    except ValueError:
        with pytest.raises(BadInput, match="malformed JSON"):
            parse(bytes(raw))
    else:
        assert twins(bytes(raw)) or plain(parse(bytes(raw))) == expected


PAIRS = st.recursive(
    st.integers(0, 9) | st.text(':"{a', max_size=3) | st.just([7] * 40),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.tuples(st.text(":a", max_size=1), inner), max_size=3).map(tuple)
    ),
    max_leaves=8,
)
"""Objects as tuples of their pairs, in which keys may be the same."""


def as_json(value: Any) -> str:
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{json.dumps(key)} : {as_json(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_json, value)) + "]"
    return json.dumps(value)


def twins(raw: bytes) -> set[str]:
    """The keys that stand more than once in an object."""
    found = set()

    def look(pairs: list[tuple[str, object]]) -> None:
        keys = [key for key, _ in pairs]
        found.update(key for key in keys if keys.count(key) > 1)

    json.loads(raw, object_pairs_hook=look)
    return found


@given(PAIRS)
@example((("a", (("a", 1), (":", [7] * 40), ("a", 2))),))
def test_a_key_that_stands_twice_in_an_object_is_refused_by_its_name(value: Any) -> None:
    raw = as_json(value).encode()
    if not (names := twins(raw)):
        assert plain(parse(raw)) == json.loads(raw)
        return
    with pytest.raises(Problem) as refused:
        parse(raw)
    assert refused.value.response.status_code == 400
    error = json.loads(bytes(refused.value.response.body))["error"]
    assert error["param"] in names
    assert f"the key {error['param']!r} stands twice" in error["message"]


def test_the_same_key_in_other_letters_is_the_same_and_a_long_one_is_cut() -> None:
    with pytest.raises(Problem, match="the key 'max_tokens' stands twice"):
        parse(rb'{"max_tokens": 1, "prompt": [' + b"1, " * 99 + rb'1], "max\u005ftokens": 2}')
    long = json.dumps("k" * 10**6)
    with pytest.raises(Problem) as refused:
        parse(f"{{{long}: 1, {long}: 2}}".encode())
    assert len(str(refused.value)) < MOST_SHOWN + 100


def test_long_lists_are_read_slice_by_slice() -> None:
    ids = list(range(100_000))
    body = json.dumps({"prompt": ids, "more": [ids[:50], [], [1.5] * 50]}).encode()
    assert len(body) > 10 * SLICE_BYTES
    parsed = parse(body)
    assert parsed["prompt"] == tuple(ids)
    assert parsed["more"] == [tuple(ids[:50]), [], [1.5] * 50]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"NaN",
        b'{"a": Infinity}',
        b'"\xff"',
        b'"\\ud800"',
        b'"\\ud800\\u0041"',
        b"[" * 100_000,
        b"[1," * 50_000,
        b"1" * 10_000,
        b'{"prompt": [' + b"1, " * 100 + b"]}",
        b'{"prompt": [' + b"1, " * 100 + b", 2]}",
        b'{"prompt": [' + b"1 " * 100 + b"]}",
        b'{"prompt": [' + b"1, " * 100,
        b'{"prompt": [' + b"1, " * 100 + b"1" * 5000 + b"]}",
        b'"\\' * 1000,
    ],
)
def test_what_is_no_json_gets_a_sentence(raw: bytes) -> None:
    with pytest.raises(BadInput, match=r"body: (malformed JSON|more than)"):
        parse(raw)


@pytest.mark.parametrize("piece", [b"[],", b"1.5,", b'"",', b"null,", b"{},", b"[1,"])
def test_a_body_of_countless_small_values_is_refused_before_it_is_parsed(piece: bytes) -> None:
    raw = b"[" + piece * MOST_BARE_BYTES + b"0]"
    with pytest.raises(BadInput, match="more than 262,144 bytes of JSON beside texts"):
        parse(raw)


def test_large_texts_and_lists_are_no_such_thing() -> None:
    raw = json.dumps({"prompt": ['a "quoted" text\\ ' * MOST_BARE_BYTES, [1] * MOST_BARE_BYTES]})
    text, ids = parse(raw.encode())["prompt"]
    assert (len(text), ids) == (len('a "quoted" text\\ ') * MOST_BARE_BYTES, (1,) * MOST_BARE_BYTES)
