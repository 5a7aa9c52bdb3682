"""What a client may say and what it gets: every path, every field, and bodies that no client would send.

MNEMOC_BODIES=100000 sends as many made-up bodies, MNEMOC_SCHEMA_EXAMPLES=200 as many for each operation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mnemoc import chat
from mnemoc.runtime import Engine
from mnemoc.runtime.init_model import CHAT_TEMPLATE
from mnemoc.runtime.server.api import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeText
from mnemoc.runtime.server.fields import NEUTRAL
from mnemoc.runtime.tokenizer import Tokenizer

Front = Callable[..., AbstractContextManager[str]]
MakeModel = Callable[..., Path]
GENERATE = ("/v1/completions", "/v1/chat/completions")
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(models: MakeModel) -> Tokenizer:
    return Tokenizer(models("llama"))


def events(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON events of a stream."""
    text = httpx.post(url + path, json={**body, "stream": True}, timeout=30).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("n", [1, 2])
def test_usage_comes_in_each_event_where_asked_for(url: str, n: int) -> None:
    counted = {"continuous_usage_stats": True, "include_usage": True}
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "n": n}
    *streamed, last = events(url, "/v1/completions", {**body, "stream_options": counted})
    for index in range(n):
        mine = [event for event in streamed if event["choices"][0]["index"] == index]
        done = [event["usage"]["completion_tokens"] for event in mine]
        assert done == sorted(done)
        assert done[-1] == 5
        assert {event["usage"]["prompt_tokens"] for event in mine} == {3}
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 5 * n, "total_tokens": 3 + 5 * n,
    }  # fmt: skip
    assert all("usage" not in event for event in events(url, "/v1/completions", body))


def test_a_text_becomes_tokens_and_tokens_a_text(url: str, tokenizer: Tokenizer) -> None:
    text = "naïve 東京 <|end_of_text|>"
    asked = {"prompt": text, "return_token_strs": True}
    answer = httpx.post(f"{url}/tokenize", json=asked).json()
    ids = list(tokenizer.encode(text))
    assert answer == {
        "count": len(ids),
        "max_model_len": 1500,
        "tokens": ids,
        "token_strs": [tokenizer.name(id) for id in ids],
    }
    back = httpx.post(f"{url}/detokenize", json={"tokens": ids})
    assert back.json() == {"prompt": text}
    long = httpx.post(f"{url}/detokenize", json={"tokens": [104, 105] * 5000})
    assert long.json() == {"prompt": "hi" * 5000}
    assert httpx.post(f"{url}/tokenize", json={"prompt": "hi" * 5000}).json()["count"] == 10000
    assert httpx.post(f"{url}/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_a_conversation_is_put_in_the_models_own_words(front: Front, models: MakeModel) -> None:
    """The folder that init-model writes has a template, and its answers are those to what it makes."""
    template = chat.load(models("llama"))
    assert template is not None
    with front(template=template) as url:
        asked = {"messages": HI, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
        tokens = httpx.post(f"{url}/tokenize", json={"messages": HI}).json()["tokens"]
        text = httpx.post(f"{url}/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert text == "<|begin_of_text|>user: hi<|end_of_text|>\nassistant:"
        same = {"prompt": tokens, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
        completion = httpx.post(f"{url}/v1/completions", json=same).json()
    assert answer["choices"][0]["message"]["content"] == completion["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_what_the_template_refuses_is_a_400_in_its_words(front: Front) -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    )
    with front(template=chat.ChatTemplate(source + CHAT_TEMPLATE, {}, Path("t"))) as url:
        said = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "system", "content": "x"}, *HI]},
        )
        assert said.status_code == 400
        assert "no system, please" in said.json()["error"]["message"]


def test_fields_that_ask_for_nothing_pass(url: str) -> None:
    neutral = {name: values[0] for name, values in NEUTRAL.items()}
    remarks = {"user": "me", "metadata": {"a": [1]}, "store": True, "unheard_of": None}
    for path, prompt in zip(GENERATE, ({"prompt": "a"}, {"messages": HI}), strict=True):
        body = {**neutral, **remarks, **prompt, "max_tokens": 2, "best_of": 2, "n": 2}
        response = httpx.post(url + path, json=body)
        assert response.status_code == 200, response.text
    ours = {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": []}
    sent_back = {"messages": [*HI, ours, *HI], "max_tokens": 2}
    assert httpx.post(url + GENERATE[1], json=sent_back).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [1, "2"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**30] * 40),
        ("prompt", [[1], "a"]),
        ("prompt", [1, [2]]),
        ("prompt", [1.0]),
        ("prompt", [True]),
        ("prompt", {"a": 1}),
        ("prompt", [""]),
        ("prompt", [[]]),
        ("prompt", ["a"] * 1025),
        ("best_of", True),
        ("best_of", 2),
        ("echo", True),
        ("response_format", {"type": "json_object"}),
        ("max_tokens", "5"),
        ("max_tokens", 2**31),
        ("seed", 2**63),
        ("temperature", "warm"),
        ("stop", ["a"] * 17),
        ("stop", [1] * 99),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", [[1, 2]]),
        ("request_id", "two words"),
        ("stream_options", {"include_usage": True}),
        ("n", 129),
        ("colour", "red"),
    ],
)
def test_a_field_that_is_wrong_is_named(url: str, field: str, value: Any) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "a", field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]
    assert error["param"] in (field, None)


@pytest.mark.parametrize(
    ("body", "sentence", "param"),
    [
        ([], "body: Input should be an object", None),
        ({"messages": HI, "echo": True}, "echo: not served, other than as false", "echo"),
        (
            {"messages": HI, "tool_choice": {}},
            'tool_choice: not served, other than as "none" or "auto"',
            "tool_choice",
        ),
        ({"messages": HI, "colour": 1}, "colour: this field is unknown", "colour"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
            "messages.0.content.0.type: Input should be 'text'",
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]},
            "messages.0.tool_calls: not served, other than as []",
            "messages",
        ),
        ({"messages": HI, "stop": 5}, "stop: Input should be a valid string", "stop"),
        (
            {"messages": HI, "stop_token_ids": [999]},
            "stop_token_ids: token ids lie in 0..319 (got 999)",
            "stop_token_ids",
        ),
    ],
)
def test_what_is_wrong_is_said_in_the_clients_words(
    url: str, body: Any, sentence: str, param: str | None
) -> None:
    error = httpx.post(f"{url}/v1/chat/completions", json=body).json()["error"]
    assert (error["message"], error["param"]) == (sentence, param)


@pytest.mark.parametrize("path", [*GENERATE, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"null", b"[]", b"[1, 2]", b'"text"', b"{}", b"[" * 9999, b'{"prompt":']
)
def test_a_body_that_is_no_object_is_refused(url: str, path: str, raw: bytes) -> None:
    response = httpx.post(url + path, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_that_does_not_say_that_it_is_json_is_refused(url: str) -> None:
    form = httpx.post(f"{url}/v1/completions", data={"prompt": "a"})
    assert (form.status_code, "application/json" in form.text) == (400, True)


def test_what_is_longer_than_16_characters_may_end_an_answer_too(url: str) -> None:
    body = {"prompt": "a", "stop": "a stop string of some length", "max_tokens": 2}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def test_models_are_listed_and_found_one_by_one(url: str, engine: Engine) -> None:
    name = engine.manifest.model["name"]
    (entry,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert httpx.get(f"{url}/v1/models/{name}").json() == entry
    assert (entry["id"], entry["max_model_len"]) == (name, 1500)
    missing = httpx.get(f"{url}/v1/models/other/name")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.get(f"{url}/version").json()["version"]
    wrong = httpx.put(f"{url}/health")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")


# ------------------------------------------------------------------------------------- made-up bodies

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
EDGES = st.sampled_from(
    [0, 1, -1, 2, 20, 21, 128, 129, 2**31, 2**63, -(2**63), 10**40, 0.0, 5e-324, 1e-9, 1.0, 1e308, "", "\0"]
)  # fmt: skip
IDS = st.lists(st.integers(-1, 330), max_size=40)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", ""])},
        optional={"content": TEXT | JUNK, "name": TEXT | JUNK, "tool_calls": JUNK},
    ),
    max_size=4,
)
NAMES = sorted(
    {*CompletionBody.model_fields, *ChatBody.model_fields, *NEUTRAL, *DetokenizeBody.model_fields}
    | {*TokenizeText.model_fields, "colour"}
)
SMALL = st.fixed_dictionaries(
    {}, optional={"max_tokens": st.integers(1, 6), "n": st.integers(1, 4)}
)
BASES = st.fixed_dictionaries({"prompt": TEXT | IDS | st.lists(TEXT | IDS, max_size=3) | JUNK}) | (
    st.fixed_dictionaries({"messages": MESSAGES}) | st.fixed_dictionaries({"tokens": IDS | JUNK})
)


@st.composite
def bodies(draw: Callable[..., Any]) -> bytes:
    """Mostly right with a few wrong fields, now and then not even JSON."""
    body = {"max_tokens": 4, **draw(BASES), **draw(SMALL)}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=4)):
        body[name] = draw(EDGES | JUNK | IDS)
    if isinstance(body.get("max_tokens"), int) and 6 < body["max_tokens"] < 2**31:
        body["max_tokens"] = 6  # it would be served, only slowly
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    raw = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(raw)))
        raw = raw[:cut] + draw(st.binary(max_size=3)) + raw[cut + draw(st.integers(0, 2)) :]
    return raw


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as held:
        yield held


@settings(
    max_examples=int(os.environ.get("MNEMOC_BODIES", "300")),
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(path=st.sampled_from([*GENERATE, "/tokenize", "/detokenize"]), raw=bodies())
def test_no_body_is_an_error_of_the_servers_own(
    url: str, client: httpx.Client, path: str, raw: bytes
) -> None:
    response = client.post(url + path, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


def test_and_nothing_of_them_is_left(url: str, engine: Engine) -> None:
    deadline = time.monotonic() + 10
    while engine.kv_used_fraction > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.num_running, engine.num_waiting, engine.kv_used_fraction) == (0, 0, 0)
    assert httpx.get(f"{url}/load").json() == {"server_load": 0}
    assert engine.healthy


# -------------------------------------------------------------------------------- the document itself


def test_the_document_describes_every_field(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    for model in (CompletionBody, ChatBody, TokenizeText, DetokenizeBody):
        assert schemas[model.__name__]["properties"].keys() >= model.model_fields.keys()
    assert issubclass(ChatBody, Body)
    for path in (*GENERATE, "/tokenize", "/detokenize"):
        assert "requestBody" in document["paths"][path]["post"]
    assert "422" not in json.dumps(document)


def test_schemathesis_finds_the_document_true(url: str, tmp_path: Path) -> None:
    """All but one check: that two fields go together (min_tokens and max_tokens), no schema can say."""
    examples, phases = os.environ.get("MNEMOC_SCHEMA_EXAMPLES", "8"), ["--phases", "fuzzing"]
    if "MNEMOC_SCHEMA_EXAMPLES" in os.environ:
        phases = ["--phases", "examples,coverage,fuzzing,stateful"]
    words = ["run", f"{url}/openapi.json", "--exclude-checks", "positive_data_acceptance", *phases]
    more = ["--max-examples", examples, "--request-timeout", "30", "--no-color"]
    ran = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *words, *more, "--seed", "7"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr
    assert "test cases" in ran.stdout.lower()
