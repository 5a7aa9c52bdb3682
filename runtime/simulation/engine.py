"""The engine on a virtual clock: the scheduler and the flights of `mnemoc serve`, and no workers.

    Simulation(manifest, cost, traffic, Asked(policy="lars")).run()

Each turn does what `runtime.Engine.step` does: fill the pipeline, hand out events, wait for what comes back.
To wait is to set the clock to whatever is next: a request that comes, or a group that is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Protocol

from ...artifact import Manifest
from ...errors import RuntimeFault, UsageError
from ...units import format_duration
from ..flights import Flights
from ..request import Event, Handle, Request, Sampling, Token
from ..scheduling.cost import PlanCost
from ..scheduling.forecast import Forecast
from ..scheduling.growth import Growth
from ..scheduling.job import MicroBatch
from ..scheduling.limits import Limits
from ..scheduling.packing import Packing
from ..scheduling.policies import DEFAULT, POLICIES
from ..scheduling.scheduler import Scheduler
from ..telemetry.machine import Machine
from ..telemetry.stats import Stats
from ..telemetry.tracing import Recorder
from .baselines import FixedChunk, WholePrefill
from .collect import Collector, Idle
from .result import Result, StageResult
from .traffic import Arrival, Survey, Traffic, page_hashes
from .virtual import Clock, Stations

OURS = "mnemoc"
"""The engine as it is."""
ENGINES = (OURS, "whole-prefill", "fixed-chunk")
SAMPLING = Sampling(ignore_eos=True)
TURNS_PER_LOOK = 512
"""Turns between two looks at the real clock, for progress."""
SECONDS_PER_NEWS = 0.2


class Progress(Protocol):
    """Told what is being done, the fraction that is done and how long the rest takes."""

    def __call__(
        self, what: str, fraction: float | None = None, eta_s: float | None = None
    ) -> None: ...


def unseen(what: str, fraction: float | None = None, eta_s: float | None = None) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Asked:
    """How to simulate. engine: one of ENGINES; the baselines have no policy but first come, first served.

    seed: as the traffic was made with; it is only noted
    most_broken: to stop, for good, once more requests than that have not kept their promises
    """

    policy: str = DEFAULT.name
    engine: str = OURS
    seed: int = 0
    most_broken: int | None = None

    def __post_init__(self) -> None:
        known = (("--policy", self.policy, tuple(POLICIES)), ("--engine", self.engine, ENGINES))
        for option, name, names in known:
            if name not in names:
                raise UsageError(
                    "no such name", where=option, got=name, do=f"one of {', '.join(names)}"
                )


class Simulation:
    """One run of some traffic through a plan. Also the executor, for `Flights`."""

    def __init__(
        self,
        manifest: Manifest,
        cost: ModuleType,
        traffic: Traffic,
        surveyed: Survey,
        asked: Asked,
        recorder: Recorder | None = None,
        on_end: Callable[[Handle], None] | None = None,
    ) -> None:
        """on_end: told of each request when it is over; then each TTFT is predicted too, which takes time."""
        plan = manifest.plan
        self._on_end = on_end
        self.manifest, self.asked, self.surveyed = manifest, asked, surveyed
        self._traffic = traffic
        self._clock = Clock()
        self._stations = Stations(plan, cost, self._clock, recorder)
        predicted = PlanCost(cost)
        policy = POLICIES[asked.policy if asked.engine == OURS else "fcfs"]
        self.policy = policy.name
        self._scheduler = Scheduler(
            plan, predicted, manifest.workload, policy, _packing(asked, manifest)
        )
        forecast = Forecast(self._scheduler, predicted) if on_end is not None else None
        self._flights = Flights(manifest, self._scheduler, self, Stats(), recorder, forecast)
        self._machine = Machine.of(manifest)
        self._collector = Collector(self._machine, Idle(plan, predicted))

    def run(self, progress: Progress = unseen) -> Result | None:
        """To the last token. None if more promises were broken than was asked for."""
        look = _Look(self, progress)
        clock, flights, stations, collector = (
            self._clock,
            self._flights,
            self._stations,
            self._collector,
        )
        most_broken = self.asked.most_broken
        handles = self._handles()
        coming = next(handles, None)
        while True:
            while flights.dispatch(clock.now_s):
                pass
            flights.clients.deliver()
            done_s = stations.next_s
            if coming is not None and (done_s is None or coming.submitted_s <= done_s):
                clock.now_s = coming.submitted_s
            elif done_s is not None:
                clock.now_s = done_s
            else:
                break
            if clock.now_s == done_s:
                while stations.next_s == done_s:
                    flights.settle(stations.pop(), done_s)
            while coming is not None and coming.submitted_s <= clock.now_s:
                flights.accept([coming], clock.now_s)
                coming = next(handles, None)
            if most_broken is not None and collector.broken > most_broken:
                return None
            look.turn()
        if collector.finished < self.surveyed.requests:
            raise RuntimeFault(
                f"{self.surveyed.requests - collector.finished} requests wait for ever at "
                f"{format_duration(clock.now_s)}: the scheduler has nothing to do"
            )
        return self._result()

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        """For `Flights`: a micro-batch sets out."""
        self._collector.sent(micro_batch, self._clock.now_s)
        self._stations.send(number, micro_batch, handles)

    @property
    def now_s(self) -> float:
        return self._clock.now_s

    @property
    def finished(self) -> int:
        return self._collector.finished

    def _handles(self) -> Iterator[Handle]:
        """The traffic as requests, but for what can never be served (it was counted before)."""
        limits = Limits.of(self.manifest)
        page_size = self.manifest.plan.page_size
        for id, arrival in enumerate(self._traffic.arrivals()):
            if limits.refusal(arrival.prompt, arrival.output) is None:
                yield self._handle(id, arrival, page_hashes(arrival, page_size, id))

    def _handle(self, id: int, arrival: Arrival, hashes: list[bytes]) -> Handle:
        prompt = range(arrival.prompt)  # no tokens: nobody reads them
        request = Request(prompt, arrival.output, SAMPLING, promise=arrival.promise)
        handle = Handle(request, id, arrival.time_s, _not_cancelled, None, 0, hashes)
        handle.hand_over = partial(self._heard, handle, arrival.kind)
        return handle

    def _heard(self, handle: Handle, kind: str, event: Event) -> None:
        if isinstance(event, Token) and event.finish is not None:
            self._collector.ended(handle, kind)
            if self._on_end is not None:
                self._on_end(handle)

    def _result(self) -> Result:
        collector, machine, surveyed = self._collector, self._machine, self.surveyed
        seconds = collector.last_s
        whole = collector.whole()
        lengths = collector.by_length()
        slowed = [cell.slowdown.mean for cell in lengths.values()]
        return Result(
            traffic=self._traffic.name,
            engine=self.asked.engine,
            policy=self.policy,
            seed=self.asked.seed,
            layout=self.manifest.plan.layout,
            seconds=seconds,
            requests=surveyed.requests,
            skipped=surveyed.skipped,
            micro_batches=collector.work.micro_batches,
            requests_per_s=whole.requests / seconds,
            prompt_tokens_per_s=whole.prompt_tokens / seconds,
            output_tokens_per_s=whole.output_tokens / seconds,
            goodput_requests_per_s=whole.kept / seconds,
            goodput_tokens_per_s=whole.kept_tokens / seconds,
            everything=whole.result("all"),
            lengths=tuple(cell.result(name) for name, cell in lengths.items()),
            kinds=tuple(cell.result(name) for name, cell in collector.by_kind().items()),
            fairness=sum(slowed) ** 2 / (len(slowed) * sum(x * x for x in slowed)),
            most_slowed=whole.slowdown.greatest,
            pages=collector.pages,
            stages=self._stages(seconds),
            mfu=_share(collector.flops / seconds, machine.peak_flops),
            mbu=_share(machine.work_bytes(collector.work) / seconds, machine.peak_bytes),
        )

    def _stages(self, seconds: float) -> tuple[StageResult, ...]:
        stations = self._stations
        busy = [[busy_s / seconds for busy_s in stage] for stage in stations.busy_s]
        links: list[float | None] = [None] * len(busy)
        if stations.overlaps:
            links[:-1] = [max(stage) / seconds for stage in stations.links_s]
        return tuple(
            StageResult(sum(stage) / len(stage), max(stage), link)
            for stage, link in zip(busy, links, strict=True)
        )


class _Look:
    """Looks at the real clock now and then, and says how far the simulation is."""

    def __init__(self, simulation: Simulation, progress: Progress) -> None:
        self._simulation = simulation
        self._progress = progress
        self._turns = 0
        self._said_s = self._began_s = time.monotonic()

    def turn(self) -> None:
        self._turns += 1
        if self._turns % TURNS_PER_LOOK:
            return
        now_s = time.monotonic()
        if now_s - self._said_s < SECONDS_PER_NEWS:
            return
        self._said_s = now_s
        simulation = self._simulation
        total = simulation.surveyed.requests
        fraction = simulation.finished / total
        eta_s = (now_s - self._began_s) * (1 / fraction - 1) if fraction else None
        self._progress(
            f"simulating: {format_duration(simulation.now_s)}, {simulation.finished:,} of "
            f"{total:,} requests",
            fraction,
            eta_s,
        )


def _packing(asked: Asked, manifest: Manifest) -> Packing | None:
    growth = Growth.of(manifest.plan)
    packings: dict[str, Callable[[], Packing]] = {
        "whole-prefill": lambda: WholePrefill(manifest.plan, growth),
        "fixed-chunk": lambda: FixedChunk(manifest.plan, growth),
    }
    return packings[asked.engine]() if asked.engine in packings else None


def _share(rate: float, peak: float | None) -> float | None:
    return None if peak is None else rate / peak


def _not_cancelled(id: int) -> None:
    """Nobody cancels a simulated request."""
