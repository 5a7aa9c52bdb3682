"""The benchmarks of traffic and scheduling: what is put to the simulation, and what is timed."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from mnemoc.codec import from_json, to_json
from mnemoc.runtime.simulation import engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    return checkout("traffic_runs")


@pytest.fixture(scope="module")
def scheduling() -> ModuleType:
    return checkout("scheduling")


def checkout(name: str) -> ModuleType:
    """A script of benchmarks/, which no wheel has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])
        return importlib.import_module(f"benchmarks.{name}")


def test_the_mix_has_its_share_of_long_requests(runs: ModuleType) -> None:
    arrivals = list(runs.mix(10.0, 0.05, 400.0).arrivals())
    assert 0.03 < sum(one.kind == "long" for one in arrivals) / len(arrivals) < 0.07
    assert {one.kind for one in runs.mix(10.0, 0.0, 10.0).arrivals()} == {"chat"}
    alike = runs.mix(10.0, 0.05, 100.0, prompt=70_000).arrivals()
    assert {one.prompt for one in alike if one.kind == "long"} == {70_000}


def test_one_long_prompt_comes_before_all_others(runs: ModuleType) -> None:
    chats = runs.mix(2.0, 0.0, 60.0)
    first, *others = runs.Beside(chats, 10**6).arrivals()
    assert (first.time_s, first.prompt, first.kind) == (0.0, 10**6, "long")
    assert others == list(chats.arrivals())


def test_the_tightest_promise_is_kept_and_a_tighter_one_is_not(runs: ModuleType) -> None:
    setup = replace(runs.SMALL, context=100_000).tightest()
    assert setup.planned.plan.layout.spp == 2
    with pytest.raises(runs.Infeasible):
        _ = replace(setup, tbt_s=setup.tbt_s - 1e-4).planned


def test_a_simulation_is_summed_up_by_kind(runs: ModuleType) -> None:
    setup = replace(runs.SMALL, context=100_000)
    traffic = runs.Beside(runs.mix(2.0, 0.0, 5.0), 90_000)
    seen = runs.seen("one", "lars", setup, 2.0, 0.0, 5.0, traffic, runs.asked("lars"))
    assert seen.long.requests == 1 < seen.chats.requests == seen.all.requests - 1
    assert 0 < seen.chats.ttft_p50_s < seen.long.ttft_p50_s
    assert from_json(runs.Seen, to_json(seen), "") == seen


def test_only_steps_with_rows_of_all_requests_are_timed(scheduling: ModuleType) -> None:
    steps = scheduling.Steps(*scheduling.SMALL.made(), [100] * 20 + [50_000])
    steps.run(4)
    assert len(steps.dispatch_s) == len(steps.settle_s) == 4
    micro_batch = steps._nobody.micro_batch
    assert (len(micro_batch.decodes), len(micro_batch.chunks)) == (20, 1)
    median, p99 = steps.figures("a step", "none")
    assert 0 < median.value <= p99.value


def test_memory_is_looked_at_on_the_way(
    scheduling: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scheduling, "MANY", 300)
    monkeypatch.setattr(engine, "TURNS_PER_LOOK", 1)
    monkeypatch.setattr(engine, "SECONDS_PER_NEWS", 0.0)
    figure, rss_mib = scheduling.memory(tmp_path)
    assert all(rss_mib.values())
    assert "MiB at 100%" in figure.detail
