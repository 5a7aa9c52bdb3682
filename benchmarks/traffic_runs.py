"""Simulations behind F8 to F10: plans of the paper's setups, its traffic through them, and what was seen.

    python -m benchmarks.traffic_runs            all of them, into benchmarks/results/paper_traffic.json

Each is the running engine's own scheduler on a virtual clock, whose seconds are those of the plan's cost
function (`mnemoc simulate`). They take ten minutes in all, so figures are told from the file; the same seeds
give the same file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

from mnemoc import pipeline
from mnemoc.artifact import Manifest, Workload
from mnemoc.codec import to_json
from mnemoc.codegen.cost import render_cost
from mnemoc.errors import Infeasible
from mnemoc.runtime.simulation import (
    Arrival,
    Asked,
    Limits,
    Result,
    Simulation,
    Traffic,
    load_workload,
    survey,
)
from mnemoc.runtime.simulation.draws import Constant

from .traffic_kept import KEPT, Capacity, Class, Kept, Seen, rounded

CONTEXT = 2_000_000
HOUR_S = 3600.0


@dataclass(frozen=True)
class Setup:
    """A plan that is asked for. layout: what is pinned."""

    model: str
    cluster: str
    gpus: int
    tbt_s: float
    tp: int
    spp: int
    kvp: int = 1
    context: int = CONTEXT

    @property
    def layout(self) -> dict[str, int | str]:
        return {"tp": self.tp, "spp": self.spp, "kvp": self.kvp}

    @property
    def planned(self) -> pipeline.Planned:
        """For one request of that context, however long it takes."""
        workload = Workload(self.context, HOUR_S, self.tbt_s)
        return pipeline.plan(self.model, self.cluster, workload, gpus=self.gpus, pinned=self.layout)

    @cache  # noqa: B019  (they live as long as the benchmark)
    def made(self) -> tuple[Manifest, ModuleType]:
        """What of the artifact a simulation needs: the manifest and the cost function, and no kernels."""
        planned = self.planned
        parts = {name: block.parts for name, block in planned.formulas.items()}
        host_s = {name: block.host_s for name, block in planned.formulas.items()}
        cost = ModuleType("cost")
        exec(render_cost(parts, host_s, planned.plan, planned.swap), cost.__dict__)
        spec, cluster = to_json(planned.spec), planned.cluster.describe()
        return Manifest(spec, cluster, planned.workload, planned.plan), cost

    def tightest(self) -> Setup:
        """The same with the shortest TBT that it can promise, to a tenth of a millisecond."""
        low, high = 0, round(self.tbt_s * 1e4)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                _ = replace(self, tbt_s=middle / 1e4).planned
                high = middle
            except Infeasible:
                low = middle
        return replace(self, tbt_s=high / 1e4)


LARGE_3D = Setup("llama-3-70b", "dgx-h100", 64, 0.05, tp=8, spp=4, kvp=2)
LARGE_2D = Setup("llama-3-70b", "dgx-h100", 64, 0.05, tp=8, spp=8)
SMALL = Setup("llama-3-8b", "dgx-a100", 16, 0.04, tp=8, spp=2)


@dataclass(frozen=True)
class Beside:
    """Some traffic, and one long prompt from the start on."""

    others: Traffic
    prompt: int

    @property
    def name(self) -> str:
        return f"{self.others.name} beside {self.prompt:,} tokens"

    def arrivals(self) -> Iterator[Arrival]:
        yield Arrival(0.0, self.prompt, 1, "long")
        yield from self.others.arrivals()

    def where(self, index: int) -> str:
        return self.others.where(index)

    def at(self, qps: float) -> Beside:
        return replace(self, others=self.others.at(qps))


def mix(qps: float, share: float, duration_s: float, prompt: int | None = None) -> Traffic:
    """The paper's conversations, and such a share of long requests; prompt: all of them that long."""
    workload = load_workload("paper-mix")
    chat, long = workload.kinds
    if prompt is not None:
        long = replace(long, prompt=Constant(prompt))
    kinds = (replace(chat, share=1 - share), *([replace(long, share=share)] if share else []))
    return replace(workload, kinds=kinds, qps=qps, duration_s=duration_s)


POLICIES = ("lars-slack", "lars", "lrs")
BASELINES = ("whole-prefill", "fixed-chunk")


def asked(how: str) -> Asked:
    """A policy by its name, or a baseline by its."""
    return Asked(engine=how) if how in BASELINES else Asked(policy=how)


def simulated(setup: Setup, traffic: Traffic, asked: Asked) -> Result:
    manifest, cost = setup.made()
    surveyed = survey(traffic, Limits.of(manifest), skip=True)
    found = Simulation(manifest, cost, traffic, surveyed, asked).run()
    assert found is not None, "it runs to its end"
    return found


def seen(
    figure: str, how: str, setup: Setup, qps: float, share: float, duration_s: float,
    traffic: Traffic, asked: Asked,
) -> Seen:  # fmt: skip
    found = simulated(setup, traffic, asked)
    kinds = {kind.name: Class.of(kind) for kind in found.kinds}
    one = Seen(
        figure,
        how,
        qps,
        share,
        duration_s,
        Class.of(found.everything),
        kinds["chat"],
        kinds.get("long"),
        rounded(found.goodput_requests_per_s),
        rounded(found.requests_per_s),
        found.pages.preemptions,
        rounded(max(stage.mean for stage in found.stages)),
        setup.tbt_s,
    )
    print(f"{figure} {how} {qps:g}/s {share:.0%}: {one.all}", file=sys.stderr, flush=True)
    return one


# ------------------------------------------------------------------------------------- what is run

F8_QPS, F8_SHARE, F8_S = 1.75, 0.05, 60.0
F8_PROMPT = 1_990_000
"""With its answer it is within 2 M tokens."""
F9_RATES, F9_S = (0.25, 0.5, 1.0), 1200.0
F9_SHARES = (0.0, 0.01, 0.05)
ONE_QPS, ONE_S, ONE_PROMPT = 2.0, 90.0, 1_000_000
"""Conversations beside one long prompt: all come before it is through."""
P90_BAR, KEPT_BAR = "p90 of TTFT below 10 s", "90 % keep their promises"
CAPACITY_S = 600.0
RATES = tuple(2 ** (step / 4) / 32 for step in range(29))
"""1/32 to 4 requests a second, each 19 % above the last."""


def f8() -> Iterator[Seen]:
    """Both layouts with one promise, with the tightest each can give, and with one time per stage."""
    setups = {
        "3D": LARGE_3D,
        "2D": LARGE_2D,
        "3D, tightest": LARGE_3D.tightest(),
        "2D, tightest": LARGE_2D.tightest(),
        "2D, twice": replace(LARGE_2D, tbt_s=2 * LARGE_2D.tbt_s),
    }
    traffic = mix(F8_QPS, F8_SHARE, F8_S, F8_PROMPT)
    for how, setup in setups.items():
        yield seen("F8", how, setup, F8_QPS, F8_SHARE, F8_S, traffic, Asked())


def f9() -> Iterator[Seen]:
    """Every engine and policy at every rate, with 5 % long requests; two of them with fewer too."""
    for qps in F9_RATES:
        traffic = mix(qps, F9_SHARES[-1], F9_S)
        for how in (*POLICIES, *BASELINES):
            yield seen("F9", how, SMALL, qps, F9_SHARES[-1], F9_S, traffic, asked(how))
    qps = F9_RATES[1]
    for share in F9_SHARES[:-1]:
        for how in (POLICIES[0], BASELINES[0]):
            traffic = mix(qps, share, F9_S)
            yield seen("F9", how, SMALL, qps, share, F9_S, traffic, asked(how))


def one_long() -> Iterator[Seen]:
    chats = mix(ONE_QPS, 0.0, ONE_S)
    yield seen("one", "idle", SMALL, ONE_QPS, 0.0, ONE_S, chats, Asked())
    traffic = Beside(chats, ONE_PROMPT)
    for how in (*POLICIES, "fcfs", *BASELINES):
        yield seen("one", how, SMALL, ONE_QPS, 0.0, ONE_S, traffic, asked(how))


def capacities() -> Iterator[Capacity]:
    """By bisection over RATES."""
    for how in ("lars-slack", *BASELINES):
        for bar in (P90_BAR, KEPT_BAR):
            low, high = -1, len(RATES)
            while high - low > 1:
                middle = (low + high) // 2
                if _meets(how, RATES[middle], bar):
                    low = middle
                else:
                    high = middle
            found = Capacity(how, bar, rounded(RATES[low]) if low >= 0 else 0.0)
            print(found, file=sys.stderr, flush=True)
            yield found


def _meets(how: str, qps: float, bar: str) -> bool:
    """Whether enough requests do at that rate; for longer at low ones, so that there are as many."""
    traffic = mix(qps, F9_SHARES[-1], max(CAPACITY_S, 100 / qps))
    if bar == P90_BAR:
        return simulated(SMALL, traffic, asked(how)).everything.ttft.p90 < 10
    manifest, cost = SMALL.made()
    surveyed = survey(traffic, Limits.of(manifest), skip=True)
    question = replace(asked(how), most_broken=surveyed.requests // 10)
    return Simulation(manifest, cost, traffic, surveyed, question).run() is not None


def main() -> None:
    found = Kept((*one_long(), *f9(), *f8()), tuple(capacities()))
    KEPT.write_text(json.dumps(to_json(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
