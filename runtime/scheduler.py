"""Which rows go into the next micro-batch: pure policy over integers, no torch, no clock of its own.

All decodes first (up to `max_batch`, those that waited longest), then prefill chunks in LARS order:

    slack s = arrival + deadline − now − remaining work        relative slack ρ = s / total work

lowest ρ first. The first chunk on a group is the plan's own for that context; further ones join
while the cost function says that the micro-batch still crosses the pipeline within the TBT promise,
and at most one of them is long (does not end its prompt). A request's next chunk may be issued while
its previous one is still in flight in a later stage (SPP); a decode needs its token first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..artifact import Plan
from .cost import Cost, Load, PrefillTime
from .growth import Growth
from .pages import PageBook

MIN_DEADLINE_S = 0.5
DEADLINE_FACTOR = 1.5


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it: lengths and times, no tokens.

    issued: prompt tokens handed to stage 0; processed: those that have left the last stage;
    cached: tokens whose K/V is stored once everything issued is through.
    """

    id: int
    prompt: int
    kv_tokens: int
    arrival_s: float
    work_s: float
    deadline_s: float
    home: int = 0
    issued: int = 0
    processed: int = 0
    cached: int = 0
    started_s: float | None = None

    def relative_slack(self, now_s: float, remaining_s: float) -> float:
        slack_s = self.arrival_s + self.deadline_s - now_s - remaining_s
        return slack_s / self.work_s if self.work_s > 0 else slack_s


@dataclass(frozen=True)
class Chunk:
    """`rows` prompt tokens of a request, after `start` cached ones; `ends`: the prompt's last."""

    id: int
    start: int
    rows: int
    ends: bool


@dataclass(frozen=True)
class Change:
    """A request begins (`job`) or gives its pages back (job is None): applied by all, in order."""

    id: int
    job: Job | None


@dataclass(frozen=True)
class MicroBatch:
    """What one step computes. groups: the KVP groups that have rows in it."""

    decodes: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    groups: frozenset[int]
    changes: tuple[Change, ...]

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(chunk.rows for chunk in self.chunks)


class Scheduler:
    """Holds the jobs and the page book; `next` makes micro-batches, `settled` and `drop` end things."""

    def __init__(self, plan: Plan, cost: Cost, context: int, tbt_s: float) -> None:
        self.plan = plan
        self.cost = cost
        self.tbt_s = tbt_s
        self.growth = Growth.of(plan)
        self.book = PageBook(self.growth, plan.num_pages, plan.page_size)
        self.prefill_time = PrefillTime(plan, cost, self.growth, context)
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self._prefilling: dict[int, Job] = {}
        self._ready: deque[Job] = deque()
        self._changes: list[Change] = []

    def add(self, id: int, prompt: int, kv_tokens: int, now_s: float) -> Job:
        """A new request; it waits until its pages can be reserved."""
        work_s = self.prefill_time.until_s(prompt)
        deadline_s = max(DEADLINE_FACTOR * work_s, MIN_DEADLINE_S)
        job = Job(id, prompt, kv_tokens, now_s, work_s, deadline_s)
        self.waiting.append(job)
        return job

    def drop(self, id: int) -> None:
        """The request is over, for whatever reason: its pages are free for the next micro-batch."""
        job = self.running.pop(id, None)
        if job is None:
            self.waiting = deque(job for job in self.waiting if job.id != id)
            return
        self._prefilling.pop(id, None)
        if job in self._ready:
            self._ready.remove(job)
        self.book.release(id, job.home, job.kv_tokens)
        self._changes.append(Change(id, None))

    @property
    def decoding(self) -> bool:
        """Whether any request is past its prompt."""
        return len(self.running) > len(self._prefilling)

    def forget_changes(self) -> None:
        """The workers start afresh and know of nothing."""
        self._changes.clear()

    def settled(self, micro_batch: MicroBatch, going_on: Iterable[int]) -> None:
        """The micro-batch left the last stage. `going_on`: requests that got a token and want another."""
        for chunk in micro_batch.chunks:
            if chunk.id in self.running:
                self.running[chunk.id].processed = chunk.start + chunk.rows
        self._ready.extend(self.running[id] for id in going_on if id in self.running)

    def next(self, now_s: float) -> MicroBatch | None:
        """The next micro-batch, or None if there is nothing to do right now."""
        self._admit(now_s)
        loads: dict[int, Load] = {}
        decodes = self._take_decodes(loads)
        chunks = self._take_chunks(loads, now_s)
        if not loads:
            return None
        changes, self._changes = tuple(self._changes), []
        return MicroBatch(decodes, chunks, frozenset(loads), changes)

    def eta_s(self, job: Job) -> float:
        """Predicted seconds until the prompt is through."""
        return self._left_s(job, job.processed)

    def _admit(self, now_s: float) -> None:
        """Reserve pages for waiting requests, in their order, on the emptiest home that fits."""
        while self.waiting:
            job = self.waiting[0]
            groups = range(self.growth.kvp)
            homes = [home for home in groups if self.book.fits(home, job.kv_tokens)]
            if not homes:
                return
            job.home = max(homes, key=lambda home: (self.book.free(home), -home))
            job.started_s = now_s
            self.book.reserve(job.id, job.home, job.kv_tokens)
            self.waiting.popleft()
            self.running[job.id] = self._prefilling[job.id] = job
            self._changes.append(Change(job.id, job))

    def _take_decodes(self, loads: dict[int, Load]) -> tuple[int, ...]:
        taken: list[int] = []
        while self._ready and len(taken) < self.plan.max_batch:
            job = self._ready.popleft()
            for shard in range(self.growth.seen_by(job.cached + 1)):
                load = loads.setdefault(self.growth.group(job.home, shard), Load())
                load.add_decode(self.growth, shard, job.cached)
            job.cached += 1
            taken.append(job.id)
        return tuple(taken)

    def _take_chunks(self, loads: dict[int, Load], now_s: float) -> tuple[Chunk, ...]:
        chunks: list[Chunk] = []
        busy: set[int] = set()  # groups with a prefill chunk in this micro-batch
        long: set[int] = set()  # ... with a long one
        full: set[int] = set()  # ... where the next one in order did not fit
        for job in self._by_slack(now_s):
            rows = min(self.plan.chunk_at(job.issued), job.prompt - job.issued)
            ends = job.issued + rows == job.prompt
            added = self._loads(job, rows, ends)
            groups = added.keys()
            if groups & full or (not ends and groups & long):
                continue
            total = {group: loads.get(group, Load()) + load for group, load in added.items()}
            if groups & busy and not self._fits(total.values()):
                full |= groups
                if len(full) == self.growth.kvp:
                    break
                continue
            loads.update(total)
            busy |= groups
            long |= set() if ends else groups
            chunks.append(Chunk(job.id, job.issued, rows, ends))
            job.issued += rows
            job.cached = job.issued
            if ends:
                del self._prefilling[job.id]
        return tuple(chunks)

    def _by_slack(self, now_s: float) -> list[Job]:
        jobs = list(self._prefilling.values())
        if len(jobs) < 2:
            return jobs
        slack = {job.id: job.relative_slack(now_s, self._left_s(job, job.issued)) for job in jobs}
        return sorted(jobs, key=lambda job: (slack[job.id], job.id))

    def _left_s(self, job: Job, done: int) -> float:
        """Predicted time for the prompt's tokens after the first `done`."""
        return max(0.0, job.work_s - self.prefill_time.until_s(done))

    def _loads(self, job: Job, rows: int, ends: bool) -> dict[int, Load]:
        loads = {}
        for shard in range(self.growth.seen_by(job.issued + rows)):
            load = loads[self.growth.group(job.home, shard)] = Load()
            load.add_chunk(self.growth, shard, job.issued, rows, ends)
        return loads

    def _fits(self, loads: Iterable[Load]) -> bool:
        return all(self.cost.crossing_s(load) <= self.tbt_s for load in loads)
