"""The engine on a virtual clock, from traffic to figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from mnemoc.artifact import ChunkRule, Manifest
from mnemoc.codec import to_json
from mnemoc.errors import UsageError
from mnemoc.runtime.request import Promise
from mnemoc.runtime.scheduling.cost import Load
from mnemoc.runtime.scheduling.growth import Growth
from mnemoc.runtime.simulation import (
    Arrival,
    Asked,
    Limits,
    Question,
    Result,
    Simulation,
    find_capacity,
    load_workload,
    survey,
)
from mnemoc.runtime.simulation.result import ClassResult
from mnemoc.runtime.telemetry.machine import Machine, Work

from .conftest import make_cost, make_manifest


@dataclass(frozen=True)
class Listed:
    """Traffic as a list."""

    requests: tuple[Arrival, ...]
    name: str = "listed"

    def arrivals(self) -> Iterator[Arrival]:
        return iter(self.requests)

    def where(self, index: int) -> str:
        return f"request {index}"

    def at(self, qps: float) -> Listed:
        rate = len(self.requests) / self.requests[-1].time_s
        moved = [dataclasses.replace(r, time_s=r.time_s * rate / qps) for r in self.requests]
        return Listed(tuple(moved))


def simulated(
    requests: Iterable[Arrival],
    manifest: Manifest | None = None,
    cost: Any = None,
    **asked: Any,
) -> Result:
    traffic = Listed(tuple(requests))
    manifest = manifest or make_manifest()
    cost = cost or make_cost(manifest.plan.layout.spp)
    surveyed = survey(traffic, Limits.of(manifest), skip=True)
    result = Simulation(manifest, cost, traffic, surveyed, Asked(**asked)).run()
    assert result is not None
    return result


def mixed(count: int, every_s: float = 0.02, long: int = 15_000) -> list[Arrival]:
    """Short requests, and long ones in between."""
    return [
        Arrival(i * every_s, long if i % 40 == 5 else 50 + 37 * i % 300, 1 + i % 30, "ab"[i % 2])
        for i in range(count)
    ]


LAYOUTS = {
    "one": {"spp": 1},
    "spp": {"spp": 3},
    "kvp": {"spp": 2, "kvp": 3},
    "helix": {"spp": 1, "kvp": 2, "ffn": "helix"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_request_gets_its_tokens_and_the_same_traffic_the_same_figures(layout: str) -> None:
    manifest = make_manifest(**LAYOUTS[layout])
    requests = mixed(120)
    first, again = (to_json(simulated(requests, manifest)) for _ in range(2))
    assert first == again
    everything = first["everything"]
    assert everything["requests"] == first["requests"] == 120
    assert everything["prompt_tokens"] == sum(r.prompt for r in requests)
    assert everything["output_tokens"] == sum(r.output for r in requests)
    assert sum(one["requests"] for one in first["lengths"]) == 120
    assert [one["name"] for one in first["kinds"]] == ["a", "b"]


def test_a_request_alone_takes_what_is_predicted_of_it() -> None:
    for spp in (1, 3):
        result = simulated([Arrival(0.0, 12_345, 5)], make_manifest(spp))
        assert result.everything.slowdown.most == pytest.approx(1, rel=0.02)
        assert result.everything.kept == 1
        gaps, cost = result.everything.tbt, make_cost(spp)
        assert gaps is not None
        assert gaps.most == pytest.approx(cost.crossing_s(1, 1, 0, 0, 12_349, 0), rel=0.01)


def test_two_requests_at_once_share_and_one_after_the_other_do_not() -> None:
    requests = [Arrival(0.0, 5000, 3), Arrival(0.0, 5000, 3)]
    together = simulated(requests).everything
    apart = simulated([requests[0], dataclasses.replace(requests[1], time_s=50.0)]).everything
    assert apart.ttft.most == pytest.approx(apart.ttft.p50, rel=0.01)
    assert together.ttft.most > 1.5 * apart.ttft.most


def test_promises_of_requests_decide_what_is_kept() -> None:
    hard = Promise(ttft_s=1e-4)
    requests = [
        Arrival(float(i), 100, 5, promise=hard if i % 4 == 0 else Promise()) for i in range(8)
    ]
    found = simulated(requests)
    assert found.everything.kept == found.everything.in_time == 0.75
    assert found.goodput_requests_per_s == pytest.approx(0.75 * found.requests_per_s)
    slow = [dataclasses.replace(r, promise=Promise(tbt_s=1e-4)) for r in requests]
    late = simulated(slow).everything
    assert (late.in_time, late.kept, late.late_tokens) == (1, 0, 1)
    assert late.lateness is not None and late.lateness.most > 1e-3


@pytest.mark.parametrize("engine", ["whole-prefill", "fixed-chunk"])
def test_behind_a_baselines_long_prompt_short_ones_wait(engine: str) -> None:
    short = [Arrival(0.1 + 0.05 * i, 50, 3) for i in range(20)]
    requests = [Arrival(0.0, 19_000, 3), *short]
    ours = simulated(requests).lengths[0]
    theirs = simulated(requests, engine=engine).lengths[0]
    assert ours.name == theirs.name == "<2K" and ours.requests == 20
    assert theirs.ttft.p50 > 10 * ours.ttft.p50


def test_a_whole_prefill_lets_nothing_in_between() -> None:
    """Decodes of the first wait until the second, long prompt is through."""
    requests = [Arrival(0.0, 100, 50), Arrival(0.02, 15_000, 2)]
    gaps = simulated(requests, engine="whole-prefill").everything.tbt
    ours = simulated(requests).everything.tbt
    assert gaps is not None and ours is not None
    assert gaps.most > 1.0 and ours.most < 0.2


def test_common_blocks_are_found_in_pages() -> None:
    blocks = tuple(range(8))
    requests = [Arrival(30.0 * i, 4096, 4, blocks=blocks, block_tokens=512) for i in range(3)]
    found = simulated(requests)
    assert found.pages.hit_tokens == 2 * (
        4096 - 16
    )  # all pages but the last: its logits are wanted
    again = simulated([dataclasses.replace(r, blocks=()) for r in requests])
    assert again.pages.hit_tokens == 0
    assert found.everything.ttft.p50 < again.everything.ttft.p50 / 10


def test_too_few_pages_preempt_and_everything_still_ends() -> None:
    requests = [Arrival(0.01 * i, 300, 400) for i in range(20)]
    manifest = make_manifest(num_pages=100)
    found = simulated(requests, manifest)
    assert found.pages.preemptions > 0
    assert found.everything.output_tokens == 20 * 400
    pages = found.pages
    assert pages.recomputed + pages.recovered > 0 and pages.hit_tokens == 0


def test_what_can_never_be_served_is_left_out_where_that_is_asked_for() -> None:
    found = simulated([Arrival(0.0, 100, 2), Arrival(0.1, 20_001, 2), Arrival(0.2, 100, 2)])
    assert (found.requests, found.skipped, found.everything.requests) == (2, 1, 2)


def test_shares_of_the_peaks_are_those_of_the_work_done() -> None:
    manifest = make_manifest(spp=1)
    found = simulated([Arrival(0.0, 100, 3)], manifest)
    rows, pairs = 100 + 2, 102 * 103 / 2
    layer = 2 * (64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 96)
    flops = 4 * (rows * layer + pairs * 4 * 4 * 16) + 3 * 2 * 64 * 320
    assert found.mfu == pytest.approx(flops / found.seconds / 1e12)
    weights = 4 * (4 * layer / 2 + 64 * 320)
    keys = 2 * 4 * 2 * 16 * 4 * (100 + 101 + 102)
    assert found.mbu == pytest.approx((3 * weights + keys) / found.seconds / 1e10)
    unknown = simulated([Arrival(0.0, 100, 3)], make_manifest(spp=1, cluster={}))
    assert unknown.mfu is None and unknown.mbu is None


@pytest.mark.parametrize("kvp", [1, 3])
def test_what_micro_batches_compute_adds_up_to_what_their_request_needs(kvp: int) -> None:
    manifest = make_manifest(kvp=kvp)
    growth, work, prompt, output = Growth.of(manifest.plan), Work(), 1000, 40
    for start in range(0, prompt, 70):
        rows = min(70, prompt - start)
        loads = [Load() for _ in range(growth.seen_by(start + rows))]
        for shard, load in enumerate(loads):
            load.add_chunk(growth, shard, start, rows, ends=start + rows == prompt)
        work.add(rows, loads)
    for cached in range(prompt, prompt + output - 1):
        loads = [Load() for _ in range(growth.seen_by(cached + 1))]
        for shard, load in enumerate(loads):
            load.add_decode(growth, shard, cached)
        work.add(1, loads)
    machine = Machine.of(manifest)
    assert machine.work_flops(work) == machine.flops(0, prompt, output)


def test_helix_reads_the_cut_weights_once() -> None:
    work = Work()
    work.add(1, [Load(T=1, R=1), Load(T=1)])
    repeated = Machine.of(make_manifest(kvp=2)).work_bytes(work)
    helix = Machine.of(make_manifest(kvp=2, ffn="helix")).work_bytes(work)
    assert repeated - helix == 4 * 4 * (64 * 64 + 3 * 64 * 96)


def test_stations_are_busy_for_as_long_as_they_work() -> None:
    found = simulated(mixed(60), make_manifest(spp=3))
    assert all(0 < stage.mean <= 1 for stage in found.stages)
    assert [stage.link is None for stage in found.stages] == [False, False, True]


def test_capacity_lies_between_what_is_enough_and_what_is_too_much() -> None:
    traffic = Listed(tuple(mixed(300, every_s=0.1, long=2000)))
    question = Question(make_manifest(), make_cost(), traffic, Asked())
    found = find_capacity(question, first_qps=10.0)
    assert question.at(found.qps) is not None and question.at(found.qps * 1.03) is None
    assert found.result is not None and found.result.everything.kept >= 0.99
    never = Listed(tuple(dataclasses.replace(r, promise=Promise(1e-6)) for r in traffic.requests))
    none = find_capacity(dataclasses.replace(question, traffic=never), first_qps=10.0)
    assert none.qps == 0 and none.result is None


def test_a_shipped_workload_runs() -> None:
    workload = dataclasses.replace(load_workload("sharegpt"), duration_s=20.0)
    manifest = make_manifest()
    surveyed = survey(workload, Limits.of(manifest), skip=False)
    found = Simulation(manifest, make_cost(), workload, surveyed, Asked()).run()
    assert found is not None and found.requests == surveyed.requests


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="lars-slack"):
        Asked(policy="lifo")
    with pytest.raises(UsageError, match="whole-prefill"):
        Asked(engine="vllm")


def test_progress_is_told_as_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnemoc.runtime.simulation.engine.SECONDS_PER_NEWS", 0.0)
    monkeypatch.setattr("mnemoc.runtime.simulation.engine.TURNS_PER_LOOK", 10)
    told: list[tuple[str, float | None, float | None]] = []
    traffic, manifest = Listed(tuple(mixed(200))), make_manifest()
    surveyed = survey(traffic, Limits.of(manifest), skip=False)

    def tell(what: str, fraction: float | None = None, eta_s: float | None = None) -> None:
        told.append((what, fraction, eta_s))

    Simulation(manifest, make_cost(), traffic, surveyed, Asked()).run(tell)
    assert told and all(what.startswith("simulating: ") for what, _, _ in told)
    fractions = [fraction or 0.0 for _, fraction, _ in told]
    assert fractions == sorted(fractions) and 0 < fractions[-1] <= 1
    assert all(eta is None or math.isfinite(eta) for _, _, eta in told)


def test_one_groups_short_decodes_do_not_wait_for_anothers_long_chunks() -> None:
    """A long prompt on its home alone, and a conversation on the other group; with groups in step, as one
    of the other engines has them, each of its tokens takes as long as a chunk."""
    manifest = make_manifest(
        spp=1, kvp=2, stripe_tokens=16_000, chunks=(ChunkRule(0, 100_000, 4000, 1, 0.0),)
    )
    chat, long = Arrival(0.01, 20, 40, "chat"), Arrival(0.0, 15_000, 1, "long")

    def gaps(*requests: Arrival, **asked: Any) -> ClassResult:
        kinds = {kind.name: kind for kind in simulated(requests, manifest, **asked).kinds}
        return kinds["chat"]

    idle, beside = gaps(chat).tbt, gaps(long, chat).tbt
    in_step = gaps(long, chat, engine="fixed-chunk").tbt
    assert idle is not None and beside is not None and in_step is not None
    assert beside.most == pytest.approx(idle.most)
    assert in_step.most > 10 * idle.most
