"""Counts what happens in a simulation, in memory that does not grow with it."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ...artifact import Plan
from ..protocol.messages import Copies
from ..request import Handle
from ..scheduling.cost import Cost, Load
from ..scheduling.growth import Growth
from ..scheduling.job import Admitted, Job, MicroBatch
from ..telemetry.machine import Machine, Work
from .histogram import Histogram
from .result import ClassResult, PageEvents, Spread

BOUNDS = (2_000, 8_000, 32_000, 128_000, 512_000)
LENGTHS = ("<2K", "2K–8K", "8K–32K", "32K–128K", "128K–512K", ">512K")
"""Classes by prompt tokens; a bound belongs to the longer class."""

ALLOWED_S = 1e-9
"""How late is not late: less than rounding."""


@dataclass(eq=False, slots=True)
class Cell:
    """Requests of one length class and one kind."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    kept: int = 0
    kept_tokens: int = 0
    in_time: int = 0
    late_tokens: int = 0
    slowdown_squares: float = 0.0
    ttft: Histogram = field(default_factory=Histogram)
    tbt: Histogram = field(default_factory=Histogram)
    lateness: Histogram = field(default_factory=Histogram)
    e2e: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    slowdown: Histogram = field(default_factory=Histogram)

    def merge(self, other: Cell) -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _HISTOGRAMS:
            getattr(self, name).merge(getattr(other, name))

    @property
    def jain(self) -> float:
        return self.slowdown.total**2 / (self.requests * self.slowdown_squares)

    def result(self, name: str) -> ClassResult:
        gaps = self.output_tokens - self.requests
        return ClassResult(
            name,
            self.requests,
            self.prompt_tokens,
            self.output_tokens,
            self.kept / self.requests,
            self.in_time / self.requests,
            self.late_tokens / gaps if gaps else 0.0,
            _spread(self.ttft),
            _spread(self.tbt) if gaps else None,
            _spread(self.lateness) if gaps else None,
            _spread(self.e2e),
            _spread(self.queued),
            _spread(self.slowdown),
            self.jain,
        )


_HISTOGRAMS = ("ttft", "tbt", "lateness", "e2e", "queued", "slowdown")
_COUNTS = (
    "requests",
    "prompt_tokens",
    "output_tokens",
    "kept",
    "kept_tokens",
    "in_time",
    "late_tokens",
    "slowdown_squares",
)


def _spread(histogram: Histogram) -> Spread:
    p50, p90, p99, p999 = (histogram.percentile(percent) for percent in (50, 90, 99, 99.9))
    return Spread(histogram.mean, p50, p90, p99, p999, histogram.greatest)


@dataclass(eq=False, slots=True)
class _Known:
    """A request that has been admitted.

    hits: tokens of it that were in pages when it came first; reached: that have been there since
    generated: by its latest admission; idle_s: TTFT with the engine to itself
    """

    job: Job
    hits: int
    idle_s: float
    queued_s: float | None = None
    reached: int = 0
    generated: int = 0


class Idle:
    """TTFT of a prompt that has the engine to itself: its chunks' pace, and the last one's way to the end."""

    def __init__(self, plan: Plan, cost: Cost) -> None:
        self._plan = plan
        self._cost = cost
        self._growth = Growth.of(plan)

    def of(self, prompt: int, work_s: float) -> float:
        """work_s: predicted time to prefill it, as its chunks follow one another."""
        before = max(0, prompt - self._plan.chunk_at(prompt - 1))
        fill_s = 0.0
        for shard in range(self._growth.seen_by(prompt)):
            load = Load()
            load.add_chunk(self._growth, shard, before, prompt - before, ends=True)
            fill_s = max(fill_s, self._cost.crossing_s(load) - self._cost.pace_s(load))
        return work_s + fill_s


class Collector:
    """Is told of micro-batches as they are sent, and of requests as they end.

    broken: requests so far that did not keep their promises
    """

    def __init__(self, machine: Machine, idle: Idle) -> None:
        self.finished = 0
        self.broken = 0
        self.work = Work()
        self.flops = 0.0
        self.last_s = 0.0
        self._machine = machine
        self._idle = idle
        self._cells: dict[tuple[int, str], Cell] = {}
        self._known: dict[int, _Known] = {}
        self._running: dict[int, _Known] = {}  # by sid
        self._preemptions = 0
        self._recomputed = 0
        self._recovered = 0
        self._hits = 0
        self._swapped_out = 0
        self._swapped_in = 0

    def sent(self, micro_batch: MicroBatch, now_s: float) -> None:
        rows = len(micro_batch.decodes) + sum(chunk.rows for chunk in micro_batch.chunks)
        self.work.add(rows, micro_batch.loads.values())
        for change in micro_batch.changes:
            if isinstance(change, Admitted):
                self._admitted(change)
            elif isinstance(change, int):
                self._running.pop(change, None)
            elif isinstance(change, Copies) and change.out:
                self._swapped_out += len(change.pairs)
            elif isinstance(change, Copies):
                self._swapped_in += len(change.pairs)
        for chunk in micro_batch.chunks:
            known = self._running[chunk.sid]
            known.reached = chunk.start + chunk.rows
            if known.queued_s is None:
                known.queued_s = now_s - known.job.arrival_s

    def _admitted(self, change: Admitted) -> None:
        job = change.job
        known = self._known.get(job.id)
        if known is None:
            idle_s = self._idle.of(job.prompt, job.work_s)
            known = self._known[job.id] = _Known(job, change.cached, idle_s)
            self._hits += change.cached
        else:
            if (
                change.generated > known.generated
            ):  # it has decoded meanwhile: all but its last token
                known.reached = job.prompt - 1
            self._preemptions += 1
            self._recovered += change.cached
            self._recomputed += max(0, known.reached - change.cached)
        known.generated = change.generated
        self._running[change.sid] = known

    def ended(self, handle: Handle, kind: str) -> None:
        """A request has all its tokens."""
        known = self._known.pop(handle.id)
        job, prompt = known.job, len(handle.request.prompt_ids)
        times_s = np.array(handle.token_times_s)
        first_s, output = float(times_s[0]), len(times_s)
        ttft_s = first_s - job.arrival_s
        cell = self._cell(prompt, kind)
        cell.requests += 1
        cell.prompt_tokens += prompt
        cell.output_tokens += output
        late = 0
        if output > 1:
            cell.tbt.add_all(np.diff(times_s))
            due_s = first_s + job.tbt_s * np.arange(1, output)
            lateness_s = np.maximum(times_s[1:] - due_s, 0.0)
            cell.lateness.add_all(lateness_s)
            late = int(np.count_nonzero(lateness_s > ALLOWED_S))
        in_time = ttft_s <= job.deadline_s + ALLOWED_S
        cell.in_time += in_time
        cell.late_tokens += late
        if in_time and not late:
            cell.kept += 1
            cell.kept_tokens += output
        else:
            self.broken += 1
        slowdown = ttft_s / known.idle_s
        cell.slowdown_squares += slowdown * slowdown
        cell.slowdown.add(slowdown)
        cell.ttft.add(ttft_s)
        assert known.queued_s is not None, "it has tokens, so it had a chunk"
        cell.queued.add(known.queued_s)
        self.last_s = max(self.last_s, float(times_s[-1]))
        cell.e2e.add(float(times_s[-1]) - job.arrival_s)
        self.flops += self._machine.flops(known.hits, prompt, output)
        self.finished += 1

    def _cell(self, prompt: int, kind: str) -> Cell:
        key = (bisect.bisect_right(BOUNDS, prompt), kind)
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = Cell()
        return cell

    def whole(self) -> Cell:
        """All requests."""
        return _merged(self._cells.values())

    def by_length(self) -> dict[str, Cell]:
        """By prompt length, where there are any, the shortest first."""
        indices = sorted({index for index, _ in self._cells})
        return {
            LENGTHS[i]: _merged(cell for (index, _), cell in self._cells.items() if index == i)
            for i in indices
        }

    def by_kind(self) -> dict[str, Cell]:
        """By the traffic's own classes, in the order of their names."""
        kinds = sorted({kind for _, kind in self._cells})
        return {
            k: _merged(cell for (_, kind), cell in self._cells.items() if kind == k) for k in kinds
        }

    @property
    def pages(self) -> PageEvents:
        return PageEvents(
            self._preemptions,
            self._recomputed,
            self._recovered,
            self._hits,
            self._swapped_out,
            self._swapped_in,
        )


def _merged(cells: Iterable[Cell]) -> Cell:
    whole = Cell()
    for cell in cells:
        whole.merge(cell)
    return whole
