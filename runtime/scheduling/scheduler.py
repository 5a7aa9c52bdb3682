"""Which rows go into the next micro-batch: pure policy over integers, no torch, no clock of its own.

All decodes first (up to `max_batch`, those that waited longest), then prefill chunks in the policy's order
(`policies`), as many and as large as `packing` says. A request's next chunk may be issued while its previous
one is still in flight in a later stage (SPP); a decode needs its token first.

Requests wait in `admission` for the pages of their prompts; what they generate takes pages as it needs them.
Where there are none, the request that came last is preempted: it waits to go on, and its pages can be found
again by their prefix for as long as nobody needs them. Whoever came first is never preempted for that, so
somebody always finishes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ...artifact import Plan, Workload
from ..request import Promise
from .admission import Admission, in_order
from .cost import Cost, Load, PrefillTime
from .growth import Growth
from .islands import Island, Islands
from .job import Chunk, Job, MicroBatch
from .overrun import Overrun
from .packing import Adaptive, Packing, add_decodes
from .pages import PageBook
from .pipeline import Pipeline
from .policies import DEFAULT, Policy

MIN_DEADLINE_S = 0.5
DEADLINE_FACTOR = 1.5
"""Where neither request nor plan says more: a prompt may take this many times what it takes alone (the
paper's)."""
LONG_ITERATIONS = 32
"""A prompt that needs more iterations than this, each as long as the TBT promise, is a long one."""

NO_PROMISE = Promise()


@dataclass
class Counts:
    """What happened to requests beside being computed.

    replays: how often a request lost its pages because the workers died
    hit_tokens: of prompts, found in pages, also of those that come back after a preemption; growths: how
        often a request took on a KVP group
    """

    preemptions: int = 0
    replays: int = 0
    hit_tokens: int = 0
    growths: int = 0


class Scheduler:
    """Holds the jobs and the page book; `next` makes micro-batches, `settled` and `drop` end things.

    running: jobs with pages, by admission (sid)
    filled: jobs whose last page was just filled by decodes; whoever knows tokens appends its hash
    """

    def __init__(
        self,
        plan: Plan,
        cost: Cost,
        workload: Workload,
        policy: Policy = DEFAULT,
        packing: Packing | None = None,
    ) -> None:
        self.plan = plan
        self.policy = policy
        self.workload = workload
        self.growth = Growth.of(plan)
        self.prefill_time = PrefillTime(plan, cost, self.growth, workload.context)
        swap_from = self.prefill_time.swap_from(cost, workload.context)
        self.book = PageBook(
            self.growth, plan.num_pages, plan.page_size, plan.host_pages, swap_from
        )
        self.counts = Counts()
        self.admission = Admission(plan, self.growth, self.book, policy, workload.tbt_s)
        self.running: dict[int, Job] = {}
        self.filled: list[Job] = []
        self.overrun = Overrun()
        self._cost = cost
        self._packing = packing or Adaptive(
            plan, cost, self.growth, policy, workload.tbt_s, self.running, self.overrun
        )
        self._prefilling: dict[int, Job] = {}
        self._ready: dict[int, Job] = {}
        self._pipeline = Pipeline(cost, self.growth.kvp)
        self._islands = Islands(plan, self.growth, self._packing.apart)
        self._decoding = [0] * self.growth.kvp

    @property
    def waiting(self) -> Mapping[int, Job]:
        """Requests without pages, by id."""
        return self.admission.waiting

    @property
    def prefilling(self) -> Collection[Job]:
        """Those with pages whose prompt is not all issued."""
        return self._prefilling.values()

    # ---------------------------------------------------------------------- requests come and go

    def add(
        self,
        id: int,
        prompt: int,
        kv_tokens: int,
        now_s: float,
        promise: Promise = NO_PROMISE,
        hashes: Sequence[bytes] | None = None,
    ) -> Job:
        """A new request; it waits until its pages can be reserved. hashes: as in `Job`."""
        work_s = self.prefill_time.until_s(prompt)
        deadline_s = promise.ttft_s
        if deadline_s is None:
            deadline_s = max(DEADLINE_FACTOR * work_s, MIN_DEADLINE_S)
            deadline_s = min(deadline_s, max(self.workload.ttft_s, work_s))
        tbt_s = promise.tbt_s if promise.tbt_s is not None else self.workload.tbt_s
        job = Job(
            id,
            prompt,
            kv_tokens,
            arrival_s=now_s,
            work_s=work_s,
            left_s=work_s,
            whole_s=work_s,
            deadline_s=deadline_s,
            tbt_s=tbt_s,
            priority=promise.priority,
            long=work_s > LONG_ITERATIONS * self.workload.tbt_s,
            hashes=None if hashes is None else list(hashes),
        )
        self.admission.wait(job)
        return job

    def drop(self, job: Job) -> None:
        """The request is over, for whatever reason: its pages are free for the next micro-batch."""
        if self.admission.waiting.pop(job.id, None) is None:
            self._leave(job)

    def restart(self) -> None:
        """The workers start afresh and know of nothing: whoever ran waits, to go on where it stopped, and
        nothing is in any page."""
        for job in list(self.running.values()):
            self._return(job)
            self.counts.replays += 1
        self.filled.clear()
        self._pipeline.clear()
        self.admission.forget()

    def decodes_on(self, group: int) -> bool:
        """Whether any request that has, or will have, tokens on the KVP group is past its prompt."""
        return self._decoding[group] > 0

    # ------------------------------------------------------------------------------ micro-batches

    def next(self, now_s: float, room: Set[int] | None = None) -> MicroBatch | None:
        """The next micro-batch, of groups that go in step, or None if there is nothing to do right now.

        room: groups that can take one; None: all can
        """
        while self.book.tidy():
            self.admission.retry()
            if self.running:  # who waits for the next step; else there is time for all of it
                break
        if self.waiting:
            for job in self.admission.admit(now_s, self._prefilling, self._preempt):
                self.running[job.sid] = self._prefilling[job.sid] = job
                self._islands.admit(job)
                job.left_s = self._left_s(job)
                self.counts.hit_tokens += job.issued
        prompts = in_order(self.policy, self._prefilling, now_s)
        for island in self._islands.now(prompts, self._ready):
            if room is None or island <= room:
                loads: dict[int, Load] = {}
                decodes: list[Job] = []
                if self._ready and not (self._packing.alone and prompts):
                    decodes = self._take_decodes(loads, island)
                chunks = self._take_chunks(prompts, decodes, loads, island, now_s)
                if loads:
                    changes, self.book.changes = tuple(self.book.changes), []
                    sids = tuple([job.sid for job in decodes])
                    expected = self._pipeline.send(loads, now_s)
                    return MicroBatch(sids, chunks, loads, changes, expected)
        return None

    def settled(self, micro_batch: MicroBatch, going_on: Iterable[int], now_s: float) -> None:
        """The micro-batch left the last stage. going_on: sids that got a token and want another"""
        expected = micro_batch.expected
        self._pipeline.landed(micro_batch.loads, expected, now_s)
        if micro_batch.chunks and micro_batch.decodes:
            self.overrun.saw(expected.through_s - expected.sent_s, now_s - expected.sent_s)
        for chunk in micro_batch.chunks:
            if (job := self.running.get(chunk.sid)) is not None:
                job.processed = chunk.start + chunk.rows
        for sid in going_on:
            if (job := self.running.get(sid)) is not None:
                self._ready[sid] = job

    def _take_decodes(self, loads: dict[int, Load], island: Island) -> list[Job]:
        taken, ready = self._islands.on(island, self._ready.values()), len(self._ready)
        for job in [job for job in taken if job.cached >= job.covered]:
            if job.sid in self._ready:  # and not preempted meanwhile
                self._extend(job)
        if len(self._ready) < ready:
            taken = [job for job in taken if job.sid in self._ready]
        del taken[self.plan.max_batch :]
        if len(taken) == len(self._ready):
            self._ready.clear()
        else:
            for job in taken:
                del self._ready[job.sid]
        add_decodes(self.growth, taken, loads)
        page_size = self.plan.page_size
        for job in taken:
            job.cached = cached = job.cached + 1
            if not cached % page_size and job.hashes is not None:
                self.filled.append(job)
        return taken

    def _take_chunks(
        self,
        prompts: list[Job],
        decodes: list[Job],
        loads: dict[int, Load],
        island: Island,
        now_s: float,
    ) -> tuple[Chunk, ...]:
        if not prompts:
            return ()
        prompts = self._islands.on(island, [job for job in prompts if job.sid in self._prefilling])
        chunks = []
        for packed in self._packing.pack(prompts, decodes, loads, island, now_s):
            job, rows = packed.job, packed.rows
            ends = job.issued + rows == job.prompt
            shards = self.growth.shards
            self.counts.growths += shards(job.issued + rows) - max(1, shards(job.issued))
            start = job.issued
            job.cached = job.issued = start + rows
            job.left_s = self._left_s(job)
            chunks.append(Chunk(job.sid, start, rows, ends, job.left_s))
            if job.hashes is not None:
                self.book.fill(job.sid, job.hashes, job.cached)
            if ends:
                del self._prefilling[job.sid]
                self._decode_on(job, 1)
        return tuple(chunks)

    def _left_s(self, job: Job) -> float:
        """Predicted time for the prompt's tokens that are not issued."""
        if job.issued == job.prompt:
            return 0.0
        return self.prefill_time.left_s(job.whole_s, job.issued)

    def alone_s(self, job: Job) -> float:
        """Predicted time for what of a waiting job's prompt is not in pages, with the engine to itself."""
        found = self.admission.home(job, self.prefilling)[1] * self.plan.page_size
        return self.prefill_time.left_s(job.whole_s, found)

    def token_s(self, job: Job) -> float:
        """Predicted time between tokens behind the job's prompt, with the engine to itself."""
        crossing_s = 0.0
        for shard in range(self.growth.seen_by(job.prompt + 1)):
            load = Load()
            load.add_decode(self.growth, shard, job.prompt)
            crossing_s = max(crossing_s, self._cost.crossing_s(load))
        return crossing_s

    # ------------------------------------------------------------------------------- preemption

    def _extend(self, job: Job) -> None:
        """Pages for the next token; at need, of whoever came last: it may be the job itself."""
        tokens = min(job.kv_tokens, job.covered + self.plan.page_size)
        while (group := self.book.extend(job.sid, tokens)) is not None:
            if self.book.tidy():
                continue
            holders = (one for one in self.running.values() if self.book.holds(one.sid, group))
            last = max(holders, key=lambda one: (one.arrival_s, one.id))
            self._preempt(last)
            if last is job:
                return
        self.admission.cover(job, tokens)

    def _preempt(self, job: Job) -> None:
        """Somebody else needs the job's pages."""
        self._return(job)
        self.counts.preemptions += 1

    def _return(self, job: Job) -> None:
        """The job waits, to go on behind what it has generated."""
        self._leave(job, returns=True)
        job.prompt += job.tokens - job.generated
        job.generated = job.tokens
        job.issued = job.processed = job.cached = 0
        job.whole_s = job.left_s = self.prefill_time.until_s(job.prompt)
        job.preemptions += 1
        job.started_s = None
        self.admission.wait(job)

    def _leave(self, job: Job, *, returns: bool = False) -> None:
        """A running job gives its pages back."""
        del self.running[job.sid]
        if self._prefilling.pop(job.sid, None) is None:
            self._decode_on(job, -1)
        self._ready.pop(job.sid, None)
        self._islands.leave(job.sid)
        self.admission.release(job, returns=returns)

    def _decode_on(self, job: Job, more: int) -> None:
        """One more, or one less, that decodes on its groups."""
        for group in self.growth.groups(job.home, job.kv_tokens):
            self._decoding[group] += more
