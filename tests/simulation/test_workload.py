"""Workload files: what they draw, that they draw it again, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from mnemoc.errors import BadInput
from mnemoc.runtime.simulation import Arrival, Workload, load_workload, shipped
from mnemoc.runtime.simulation.draws import Arriving

CLASS = """
[[class]]
name = "one"
share = 1
prompt = { distribution = "constant", tokens = 10 }
output = { distribution = "empirical", values = [3, 5] }
"""
FILE = f"qps = 2.0\nduration_s = 50\n{CLASS}"


def written(folder: Path, text: str) -> Workload:
    (folder / "w.toml").write_text(text)
    return load_workload(str(folder / "w.toml"))


def tokens(found: list[Arrival], side: str) -> list[float]:
    return np.percentile([getattr(one, side) for one in found], [50, 90]).tolist()


def test_the_papers_mix_has_the_papers_percentiles() -> None:
    mix = dataclasses.replace(load_workload("paper-mix"), qps=10.0, duration_s=4000)
    found = list(mix.arrivals())
    long = [one for one in found if one.kind == "long"]
    assert len(found) == pytest.approx(40_000, rel=0.03)
    assert len(long) == pytest.approx(2000, rel=0.1)
    assert tokens(long, "prompt") == pytest.approx([393_000, 839_000], rel=0.06)
    assert tokens(long, "output") == pytest.approx([518, 808], rel=0.06)
    chats = [one for one in found if one.kind == "chat"]
    assert tokens(chats, "output") == pytest.approx([415, 834], rel=0.04)
    assert tokens(chats, "prompt") == pytest.approx([1730, 5696], rel=0.04)
    assert max(one.prompt + one.output for one in chats) <= 8192
    assert [one.time_s for one in found] == sorted(one.time_s for one in found)


def test_the_same_seed_gives_the_same_requests_and_another_rate_the_same_lengths() -> None:
    workload = dataclasses.replace(load_workload("sharegpt"), duration_s=200)
    first, again = list(workload.arrivals()), list(workload.arrivals())
    assert first == again
    other = list(dataclasses.replace(workload, seed=1).arrivals())
    assert [one.prompt for one in first[:50]] != [one.prompt for one in other[:50]]
    faster = list(workload.at(2.0).arrivals())
    assert len(faster) > len(first)
    assert [(a.prompt, a.output) for a in faster[: len(first)]] == [
        (a.prompt, a.output) for a in first
    ]
    assert [a.time_s for a in faster[: len(first)]] == pytest.approx([a.time_s / 2 for a in first])


def test_every_shipped_workload_reads() -> None:
    assert shipped() == ("paper-mix", "sharegpt")
    assert all(load_workload(name).kinds for name in shipped())


@pytest.mark.parametrize(
    ("arriving", "cv"),
    [
        (Arriving("poisson"), 1.0),
        (Arriving("gamma", cv=3.0), 3.0),
        (Arriving("constant"), 0.0),
        (Arriving("bursts", size=4), (2 * 4 - 1) ** 0.5),
    ],
)
def test_processes_keep_the_rate_and_have_their_spread(arriving: Arriving, cv: float) -> None:
    gaps = arriving.draw(np.random.default_rng(0), 100_000, rate=5.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_a_file_may_hold_promises_and_each_class_its_own_process(tmp_path: Path) -> None:
    more = 'ttft_s = 0.5\npriority = 2\narrivals = { process = "constant" }\n'
    found = list(written(tmp_path, FILE + more).arrivals())
    assert [one.time_s for one in found[:3]] == pytest.approx([0.5, 1.0, 1.5])
    assert found[0].promise.ttft_s == 0.5 and found[0].promise.priority == 2
    assert {one.output for one in found} == {3, 5}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("qps = 2.0", "", "'qps' is missing"),
        ("qps = 2.0", "qps = 0", "qps must lie between"),
        ("qps = 2.0", "qps = nan", "qps must lie between"),
        ("qps = 2.0", f"qps = {10**400}", "qps must lie between"),
        ('name = "', 'name = "\\n', "name cannot be printed"),
        ("qps = 2.0", "qps = true", "qps must be a number"),
        ("qps = 2.0", "qps = 2.0\nqpm = 1", "unknown key 'qpm'"),
        ("qps = 2.0", "qps = 2.0 2", "not TOML"),
        (CLASS, "", "'class' is missing"),
        (CLASS, CLASS + CLASS, "two classes have the same name"),
        ("share = 1", "share = -1", "share must lie between"),
        ("share = 1", "share = 1\nmost = 5", "leaves no room for a prompt"),
        ("tokens = 10", "tokens = 0", "tokens must lie between"),
        ("tokens = 10", "token = 10", "'tokens' is missing"),
        ("tokens = 10", "tokens = 10, p90 = 4", "unknown key 'p90'"),
        ('"constant"', '"normal"', "no such distribution"),
        ("[3, 5]", "[]", "must be whole numbers"),
        ("[3, 5]", "[3, 5.5]", "must be whole numbers"),
        ("share = 1", 'share = 1\narrivals = { process = "rush" }', "no such process"),
        ("share = 1", 'share = 1\narrivals = { process = "gamma" }', "'cv' is missing"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, old: str, new: str, what: str) -> None:
    assert old in FILE
    with pytest.raises(BadInput, match=what):
        written(tmp_path, FILE.replace(old, new))


def test_a_workload_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(BadInput, match="paper-mix, sharegpt"):
        load_workload("papermix")
