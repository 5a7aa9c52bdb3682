"""Traces of three kinds, and everything that can be wrong with them."""

import json
from pathlib import Path

import pytest
from mnemoc.errors import BadInput
from mnemoc.runtime.request import Promise
from mnemoc.runtime.simulation import Arrival, Limits, Trace, survey
from mnemoc.runtime.simulation.traffic import page_hashes

from .conftest import make_manifest

OURS = '{"time_s": 0.5, "prompt_tokens": 812, "output_tokens": 64}'
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def trace(folder: Path, *lines: str, end: str = "\n") -> Trace:
    path = folder / "trace"
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return Trace(path)


def ours(**changes: object) -> str:
    return json.dumps({"time_s": 0.5, "prompt_tokens": 812, "output_tokens": 64} | changes)


def test_ours_with_and_without_all_that_may_be_there(tmp_path: Path) -> None:
    full = ours(time_s=2, blocks=[7, 9], ttft_s=0.3, tbt_s=0.05, priority=-1, **{"class": "chat"})
    assert list(trace(tmp_path, OURS, full).arrivals()) == [
        Arrival(0.5, 812, 64, block_tokens=512),
        Arrival(2.0, 812, 64, "chat", Promise(0.3, 0.05, -1), (7, 9), 512),
    ]


@pytest.mark.parametrize("zone", ["", "+00:00"], ids=["2023", "2024"])
def test_azure_counts_from_its_first_row(tmp_path: Path, zone: str) -> None:
    rows = (
        f"2023-11-16 18:17:03.9799600{zone},4808,10",
        f"2023-11-16 18:17:04.0319600{zone},110,27",
        f"2023-11-17 00:00:00{zone},1,1",
    )
    found = list(trace(tmp_path, HEADER, *rows, end="").arrivals())
    assert [(one.prompt, one.output) for one in found] == [(4808, 10), (110, 27), (1, 1)]
    assert [one.time_s for one in found] == pytest.approx([0, 0.052, 20_576.02004], abs=1e-6)


def test_mooncake_is_in_milliseconds_and_names_blocks(tmp_path: Path) -> None:
    line = '{"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 2353]}'
    (found,) = trace(tmp_path, line).arrivals()
    assert found == Arrival(pytest.approx(27.482), 600, 52, blocks=(46, 2353), block_tokens=512)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    found = trace(tmp_path, "\ufeff" + HEADER + "\r", "2023-11-16 18:17:03,5,6\r").arrivals()
    assert list(found) == [Arrival(0.0, 5, 6)]


@pytest.mark.parametrize(
    ("lines", "number", "what"),
    [
        ([ours(time_s=-1)], 1, "0 or more"),
        (['{"time_s": NaN, "prompt_tokens": 8, "output_tokens": 6}'], 1, "NaN is no number"),
        (['{"time_s": 1e999, "prompt_tokens": 8, "output_tokens": 6}'], 1, "0 or more"),
        ([ours(time_s=1e12)], 1, "30 years"),
        ([ours(time_s="1")], 1, "not a number"),
        ([ours(time_s=True)], 1, "not a number"),
        ([OURS, ours(time_s=0.4)], 2, "comes before"),
        ([ours(prompt_tokens=0)], 1, "between 1 and"),
        ([ours(output_tokens=0)], 1, "between 1 and"),
        ([ours(prompt_tokens=10**12)], 1, "between 1 and"),
        ([ours(prompt_tokens=1.5)], 1, "not a whole number"),
        ([ours(prompt_tokens=12.0)], 1, "not a whole number"),
        ([ours(prompt_tokens=None)], 1, "not a whole number"),
        ([ours(prompts=3)], 1, "unknown key 'prompts'"),
        (['{"time_s": 1, "output_tokens": 6}'], 1, "'prompt_tokens' is missing"),
        (['{"time_s": 1, "time_s": 2, "output_tokens": 6}'], 1, "'time_s' stands there twice"),
        ([ours(ttft_s=0)], 1, "more than 0"),
        ([ours(priority=0.5)], 1, "priority is not a whole number"),
        ([ours(blocks=[1, 2, 3])], 1, "2 in all"),
        ([ours(blocks=[1, -2])], 1, "no block id"),
        ([ours(blocks="12")], 1, "not a list"),
        ([OURS, "", OURS], 2, "an empty line"),
        ([OURS, OURS[:-3]], 2, "not a JSON object"),
        ([OURS, "[" * 100_000], 2, "not a JSON object"),
        (["[1, 2]"], 1, "known kind"),
        (["TIMESTAMP;ContextTokens;GeneratedTokens"], 1, "known kind"),
        (['{"when": 3}'], 1, "neither"),
        ([HEADER, "2023-11-16 18:17:03,5"], 2, "2 fields"),
        ([HEADER, "2023-11-16 18:17:03,5,"], 2, "not a whole number"),
        ([HEADER, "2023-11-16 18:17:03,5.5,3"], 2, "not a whole number"),
        ([HEADER, "2023-11-16 18:17:03,-5,3"], 2, "not a whole number"),
        ([HEADER, "yesterday,5,3"], 2, "TIMESTAMP"),
        ([HEADER, "2023-11-16 18:17:03,5,3", "2023-11-16 18:17:04+00:00,5,3"], 3, "TIMESTAMP"),
        ([HEADER, "2023-11-16 18:17:03,5,3", "2023-11-16 18:17:02,5,3"], 3, "comes before"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    tmp_path: Path, lines: list[str], number: int, what: str
) -> None:
    with pytest.raises(BadInput) as refused:
        list(trace(tmp_path, *lines).arrivals())
    assert str(refused.value).startswith(f"{tmp_path}/trace, line {number}: ")
    assert what in str(refused.value)


@pytest.mark.parametrize("data", ["trace".encode("utf-16"), b"\x1f\x8b\x08", b'{"a": "\xff"}'])
def test_other_encodings_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "trace").write_bytes(data)
    with pytest.raises(BadInput, match="line 1: not UTF-8"):
        list(Trace(tmp_path / "trace").arrivals())


def test_files_that_are_empty_or_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="empty"):
        list(trace(tmp_path, end="").arrivals())
    with pytest.raises(BadInput, match="cannot read: No such file"):
        list(Trace(tmp_path / "none").arrivals())
    with pytest.raises(BadInput, match="cannot read: Is a directory"):
        list(Trace(tmp_path).arrivals())


def test_another_rate_stretches_time_and_a_duration_cuts_it(tmp_path: Path) -> None:
    lines = [ours(time_s=second) for second in range(1, 11)]
    slow = trace(tmp_path, *lines).at(0.5)
    assert [one.time_s for one in slow.arrivals()] == pytest.approx(range(2, 21, 2))
    short = Trace(slow.path, slow.stretch, duration_s=6.5)
    assert len(list(short.arrivals())) == 3


def test_what_can_never_fit_is_refused_at_once_or_counted(tmp_path: Path) -> None:
    limits = Limits.of(make_manifest(num_pages=100))  # 1,600 tokens
    lines = [ours(), ours(prompt_tokens=1500, output_tokens=102), ours(prompt_tokens=20_001)]
    with pytest.raises(BadInput, match=r"trace, line 2: .* need 101 KV pages .* has 100"):
        survey(trace(tmp_path, *lines), limits, skip=False)
    with pytest.raises(
        BadInput, match=r"line 2: the prompt has 20,001 tokens, the plan is for 20K"
    ):
        survey(trace(tmp_path, lines[0], lines[2]), limits, skip=False)
    found = survey(trace(tmp_path, *lines), limits, skip=True)
    assert (found.requests, found.skipped) == (1, 2)
    with pytest.raises(BadInput, match="no request in it can be served"):
        survey(trace(tmp_path, lines[2]), limits, skip=True)


def test_the_number_of_a_line_counts_azures_header(tmp_path: Path) -> None:
    rows = ["2023-11-16 18:17:03,5,3", "2023-11-16 18:17:03,50000,3"]
    with pytest.raises(BadInput, match="line 3: the prompt has 50,000"):
        survey(trace(tmp_path, HEADER, *rows), Limits.of(make_manifest()), skip=False)


def test_pages_are_equal_as_far_as_blocks_are() -> None:
    one = Arrival(0, 1500, 1, blocks=(5, 6, 7), block_tokens=512)
    two = Arrival(0, 1536, 1, blocks=(5, 6, 8), block_tokens=512)
    mine, other = page_hashes(one, 100, 1), page_hashes(two, 100, 2)
    assert len(mine) == len(other) == 15
    assert mine[:10] == other[:10] and not set(mine[10:]) & set(other[10:])
    assert len(set(mine)) == 15


def test_pages_beyond_blocks_are_a_requests_own() -> None:
    part = Arrival(0, 600, 1, blocks=(5,), block_tokens=512)
    mine, other = page_hashes(part, 100, 1), page_hashes(part, 100, 2)
    assert mine[:5] == other[:5] and mine[5] != other[5]
    bare = Arrival(0, 600, 1)
    assert not set(page_hashes(bare, 100, 1)) & set(page_hashes(bare, 100, 2))
