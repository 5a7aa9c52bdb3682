"""What the engine itself costs: a step of many requests and of a very long one, an hour of traffic, memory.

    python -m benchmarks.scheduling        also benchmarks/results/scheduling.{json,md}

Nothing computes: micro-batches come back as soon as they are sent, with a token for whoever wants one. What
is timed is the engine's own work per step, scheduler, pages and clients included: to dispatch it, and to
settle it. Its collector is set as the engine sets it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from mnemoc.artifact import Manifest
from mnemoc.runtime import Request, Sampling, collector
from mnemoc.runtime.flights import Flights
from mnemoc.runtime.protocol.messages import Done
from mnemoc.runtime.request import Handle, Promise
from mnemoc.runtime.scheduling.cost import PlanCost
from mnemoc.runtime.scheduling.forecast import Forecast
from mnemoc.runtime.scheduling.job import MicroBatch
from mnemoc.runtime.scheduling.prefix import page_hashes
from mnemoc.runtime.scheduling.scheduler import Scheduler
from mnemoc.runtime.simulation import Asked, Limits, Simulation, Trace, survey
from mnemoc.runtime.telemetry.stats import Stats

from .harness import Figure, say, write_report
from .traffic_runs import SMALL, Setup, mix, simulated

RUNNING, STEPS = 1000, 300
LONG = 1_000_000
"""The prompt beside them, so that each step has a chunk to choose too."""
OUTPUT, SAMPLING = 4000, Sampling(ignore_eos=True)
PATIENT = Promise(tbt_s=10.0)
"""So that all are past their prompts soon."""
LONGEST = 10_000_000
FAR = Setup("llama-3-8b", "dgx-h100", 128, 0.03, tp=8, spp=4, kvp=4, context=LONGEST)
QUEUE, FORECASTS = 40, 50
"""Prompts that wait, and forecasts of when all of them will come."""
HOURS_QPS = (0.5, 1.0)
MANY, MANY_QPS = 10**6, 1000.0
SHARES = (0.1, 0.5, 1.0)


class Nobody:
    """An executor that only notes what it was sent."""

    def __init__(self) -> None:
        self.number = -1
        self.micro_batch = MicroBatch((), (), {}, ())

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        self.number, self.micro_batch = number, micro_batch


class Steps:
    """Seconds of each step in which all requests had rows, to dispatch and to settle it."""

    def __init__(self, manifest: Manifest, cost: ModuleType, prompts: Sequence[int]) -> None:
        self.dispatch_s: list[float] = []
        self.settle_s: list[float] = []
        self._ids, self._now_s = itertools.count(), 0.0
        self._nobody = Nobody()
        self._scheduler = Scheduler(manifest.plan, PlanCost(cost), manifest.workload)
        self._flights = Flights(manifest, self._scheduler, self._nobody, Stats())
        self._forecast = Forecast(self._scheduler, PlanCost(cost))
        self._step_s = manifest.workload.tbt_s
        for prompt in prompts:
            self.come(prompt)

    def come(
        self, prompt: int, output: int = OUTPUT, hashes: Sequence[bytes] | None = None
    ) -> float:
        """A request; seconds to take it on."""
        request = Request(range(prompt), output, SAMPLING, promise=PATIENT)
        handle = Handle(request, next(self._ids), self._now_s, _ignore, _ignore, 0, hashes)
        began_s = time.perf_counter()
        self._flights.accept([handle], self._now_s)
        return time.perf_counter() - began_s

    def step(self) -> tuple[float, float] | None:
        """Seconds to dispatch it and to settle it; None: nobody is left."""
        flights = self._flights
        began_s = time.perf_counter()
        if not flights.dispatch(self._now_s):
            return None
        sent_s = time.perf_counter()
        dones = self._dones()
        answered_s = time.perf_counter()
        for done in dones:
            flights.settle(done, self._now_s)
        flights.clients.deliver()
        settled_s = time.perf_counter()
        self._now_s += self._step_s
        return sent_s - began_s, settled_s - answered_s

    def run(self, steps: int) -> None:
        requests = len(self._scheduler.running) + len(self._scheduler.waiting)
        while len(self.dispatch_s) < steps:
            took_s = self.step()
            assert took_s is not None, "there is always something to do"
            micro_batch = self._nobody.micro_batch
            if len(micro_batch.decodes) + len(micro_batch.chunks) == requests:
                self.dispatch_s.append(took_s[0])
                self.settle_s.append(took_s[1])

    def forecasts_s(self, count: int) -> list[float]:
        """Seconds that each takes, to the very last prompt."""
        found_s = []
        for _ in range(count):
            began_s = time.perf_counter()
            self._forecast.look(self._now_s, ())
            found_s.append(time.perf_counter() - began_s)
        return found_s

    def _dones(self) -> list[Done]:
        """What the groups answer; the first one to answer has all tokens."""
        number, micro_batch = self._nobody.number, self._nobody.micro_batch
        sids = [*micro_batch.decodes, *(chunk.sid for chunk in micro_batch.chunks if chunk.ends)]
        tokens = [(sid, 1) for sid in sids]
        first, *others = micro_batch.loads
        return [
            Done(number, first, tokens, (), 0.0),
            *(Done(number, group, (), (), 0.0) for group in others),
        ]

    def figures(self, name: str, aim: str) -> list[Figure]:
        whole_s = [a + b for a, b in zip(self.dispatch_s, self.settle_s, strict=True)]
        median_s = statistics.median(whole_s)
        dispatch_s, settle_s = map(statistics.median, (self.dispatch_s, self.settle_s))
        parts = f"{dispatch_s * 1e6:.0f} to dispatch, {settle_s * 1e6:.0f} to settle"
        p99_s = statistics.quantiles(whole_s, n=100)[98]
        return [
            Figure(f"{name}, median", median_s * 1e6, "µs", aim, parts),
            Figure(f"{name}, p99", p99_s * 1e6, "µs", aim, f"{len(whole_s)} steps"),
        ]


def _ignore(what: object) -> None:
    """Nobody cancels; nobody listens."""


def hit(steps: Steps, page_size: int) -> Figure:
    """The longest prompt again, once it has been computed: all of it is found in pages."""
    hashes = page_hashes(range(LONGEST), page_size)
    steps.come(LONGEST, 1, hashes)
    while steps.step() is not None:
        pass
    steps.come(LONGEST, 1, hashes)
    took_s = steps.step()
    assert took_s is not None, "its last token is to be computed"
    detail = f"{len(hashes):,} pages of {page_size} tokens"
    return Figure(f"the step that finds {LONGEST:,} tokens", sum(took_s) * 1e3, "ms", "-", detail)


def hour(qps: float) -> Figure:
    """Wall time of an hour of the paper's mix on 16 A100, for each hour that it took there."""
    began_s = time.perf_counter()
    found = simulated(SMALL, mix(qps, 0.05, 3600), Asked())
    wall_s = time.perf_counter() - began_s
    detail = (
        f"{found.micro_batches:,} micro-batches, {found.seconds:,.0f} simulated s in {wall_s:.1f} s"
    )
    value = wall_s * 3600 / found.seconds
    return Figure(f"an hour of the paper's mix, {qps:g}/s", value, "s", "< 30 s", detail)


def memory(folder: Path) -> tuple[Figure, dict[str, float]]:
    """Resident memory while a million small requests go through."""
    trace = folder / "trace.jsonl"
    with trace.open("w") as file:
        for index in range(MANY):
            line = {
                "time_s": index / MANY_QPS,
                "prompt_tokens": 16 + index % 48,
                "output_tokens": 1,
            }
            file.write(json.dumps(line) + "\n")
    manifest, cost = SMALL.made()
    traffic, rss_mib = Trace(trace), dict.fromkeys(SHARES, 0.0)

    def watch(what: str, fraction: float | None = None, eta_s: float | None = None) -> None:
        for share in SHARES:
            if not rss_mib[share] and (fraction or 0.0) >= share:
                rss_mib[share] = _rss_mib()

    surveyed = survey(traffic, Limits.of(manifest), skip=False)
    began_s = time.perf_counter()
    Simulation(manifest, cost, traffic, surveyed, Asked()).run(watch)
    wall_s = time.perf_counter() - began_s
    rss_mib[1.0] = rss_mib[1.0] or _rss_mib()
    texts = ", ".join(f"{mib:.1f} MiB at {share:.0%}" for share, mib in rss_mib.items())
    grown = rss_mib[1.0] / rss_mib[0.1]
    figure = Figure(
        f"memory of {MANY:,} requests, at the end over at 10 %",
        grown,
        "×",
        "1",
        f"{texts}; {wall_s:.0f} s",
    )
    return figure, {f"{share:g}": mib for share, mib in rss_mib.items()}


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    made = SMALL.made(), FAR.made()
    collector.keep_out()
    many = Steps(*made[0], [500] * RUNNING + [LONG])
    many.run(STEPS)
    long = Steps(*made[1], [LONGEST])
    long.run(5 * STEPS)
    figures = many.figures(f"a step of {RUNNING:,} decodes and a chunk", "≤ 1 ms")
    figures += long.figures("a step of one request of 10 M tokens", "≤ 100 µs")
    for _ in range(QUEUE):
        many.come(LONG)
    crowded_s = many.forecasts_s(FORECASTS)
    detail = f"worst {max(crowded_s) * 1e3:.3g} ms of {FORECASTS}"
    name = f"a forecast beside {RUNNING:,} decodes, {QUEUE} long prompts waiting, median"
    figures.append(Figure(name, statistics.median(crowded_s) * 1e3, "ms", "-", detail))
    figures.append(hit(Steps(*made[1], []), made[1][0].plan.page_size))
    say("steps are timed")
    figures += [hour(qps) for qps in HOURS_QPS]
    say("hours are simulated")
    with tempfile.TemporaryDirectory() as folder:
        flat, rss_mib = memory(Path(folder))
    runs = {
        "many_dispatch_s": many.dispatch_s,
        "many_settle_s": many.settle_s,
        "long_dispatch_s": long.dispatch_s,
        "long_settle_s": long.settle_s,
        "crowded_forecast_s": crowded_s,
        "rss_mib": rss_mib,
    }
    write_report("scheduling", "What the engine itself costs", [*figures, flat], runs)


if __name__ == "__main__":
    main()
