"""Which rows go into the next micro-batch: pure policy over integers, no torch, no clock of its own.

All decodes first (up to `max_batch`, those that waited longest), then prefill chunks in the policy's order
(`policies`), as many and as large as `packing` says. A request's next chunk may be issued while its previous
one is still in flight in a later stage (SPP); a decode needs its token first.

A request is admitted when all pages of its prompt are free, on all its groups, or none is taken: growing
piecemeal could deadlock several long requests that each hold half. What it generates takes pages as it needs
them. Where there are none, the request that came last is preempted: its pages can be found again by
their prefix for as long as nobody needs them, and it waits to go on. Whoever came first is never preempted
for that, so somebody always finishes. A waiting request may also take the place of prompts that have far
more time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..artifact import Plan, Workload
from .cost import Cost, Load, PrefillTime
from .growth import Growth
from .job import Admitted, Chunk, Job, MicroBatch
from .packing import Adaptive, Packing
from .pages import PageBook
from .policies import DEFAULT, Policy
from .request import Promise

MIN_DEADLINE_S = 0.5
DEADLINE_FACTOR = 1.5
"""Where neither request nor plan says more: a prompt may take this many times what it takes alone (the
paper's)."""
LONG_ITERATIONS = 32
"""A prompt that needs more iterations than this, each as long as the TBT promise, is a long one."""
OUTPUT_PAGES = 2
"""Pages that a request has beside its prompt's when it is admitted."""
SHORT_SHARE = 1 / 8
"""Of all pages, those that long prompts leave to short ones, and that these may take while one waits."""
MOST_PREEMPTIONS = 3
"""How often a prompt's pages may go to a more urgent one; then it keeps them."""
MOST_OVERTAKEN = 8
"""Waiting requests without room that are passed over in one go, in search of one that fits."""

NO_PROMISE = Promise()


@dataclass
class Counts:
    """What happened to requests beside being computed.

    hit_tokens: of prompts, found in pages; growths: how often a request took on a KVP group
    """

    preemptions: int = 0
    hit_tokens: int = 0
    growths: int = 0


class Scheduler:
    """Holds the jobs and the page book; `next` makes micro-batches, `settled` and `drop` end things.

    waiting: by request; running: by admission (sid)
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
        self.book = PageBook(
            self.growth, plan.num_pages, plan.page_size, plan.host_pages, self._swap_from(cost)
        )
        self.counts = Counts()
        self.waiting: dict[int, Job] = {}
        self.running: dict[int, Job] = {}
        self.filled: list[Job] = []
        self._packing = packing or Adaptive(
            plan, cost, self.growth, policy, workload.tbt_s, self.running
        )
        self._prefilling: dict[int, Job] = {}
        self._ready: dict[int, Job] = {}
        self._sids = itertools.count()
        self._short_tokens = 0  # that running requests with short prompts have pages for
        self._kept_tokens = int(SHORT_SHARE * plan.num_pages * self.growth.kvp) * plan.page_size
        self._retry_s = -math.inf  # no admission is tried before, unless pages or requests came

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
        self.waiting[id] = job
        self._retry_s = -math.inf
        return job

    def drop(self, job: Job) -> None:
        """The request is over, for whatever reason: its pages are free for the next micro-batch."""
        if self.waiting.pop(job.id, None) is None:
            self._leave(job)

    def restart(self) -> None:
        """The workers start afresh and know of nothing: whoever ran is gone, and what was in pages too."""
        assert not self.running, "whoever ran has been dropped"
        self.book.forget()
        self._retry_s = -math.inf

    @property
    def decoding(self) -> bool:
        """Whether any request is past its prompt."""
        return len(self.running) > len(self._prefilling)

    # ------------------------------------------------------------------------------ micro-batches

    def next(self, now_s: float) -> MicroBatch | None:
        """The next micro-batch, or None if there is nothing to do right now."""
        if self.waiting and now_s >= self._retry_s:
            self._admit(now_s)
        loads: dict[int, Load] = {}
        decodes: list[Job] = []
        if self._ready and not (self._packing.alone and self._prefilling):
            decodes = self._take_decodes(loads)
        chunks = self._take_chunks(decodes, loads, now_s) if self._prefilling else ()
        if not loads:
            return None
        changes, self.book.changes = tuple(self.book.changes), []
        return MicroBatch(tuple([job.sid for job in decodes]), chunks, loads, changes)

    def settled(self, micro_batch: MicroBatch, going_on: Iterable[int]) -> None:
        """The micro-batch left the last stage. going_on: sids that got a token and want another."""
        for chunk in micro_batch.chunks:
            if (job := self.running.get(chunk.sid)) is not None:
                job.processed = chunk.start + chunk.rows
        for sid in going_on:
            if (job := self.running.get(sid)) is not None:
                self._ready[sid] = job

    def _take_decodes(self, loads: dict[int, Load]) -> list[Job]:
        for job in [job for job in self._ready.values() if job.cached >= job.covered]:
            if job.sid in self._ready:  # and not preempted meanwhile
                self._extend(job)
        taken = list(self._ready.values())
        if len(taken) > self.plan.max_batch:
            del taken[self.plan.max_batch :]
            for job in taken:
                del self._ready[job.sid]
        else:
            self._ready.clear()
        growth, page_size = self.growth, self.plan.page_size
        one_group = math.inf if growth.kvp == 1 else 0 if growth.helix else growth.stripe_tokens
        for job in taken:
            cached = job.cached
            if cached < one_group:  # the common case, in few steps: thousands of these a second
                load = loads.get(job.home)
                if load is None:
                    load = loads[job.home] = Load()
                load.T += 1
                load.R += 1
                load.KD += cached + 1
            else:
                for shard in range(growth.seen_by(cached + 1)):
                    load = loads.setdefault(growth.group(job.home, shard), Load())
                    load.add_decode(growth, shard, cached)
            job.cached = cached + 1
            if not job.cached % page_size and job.hashes is not None:
                self.filled.append(job)
        return taken

    def _take_chunks(
        self, decodes: list[Job], loads: dict[int, Load], now_s: float
    ) -> tuple[Chunk, ...]:
        chunks = []
        for packed in self._packing.pack(
            self._in_order(self._prefilling, now_s), decodes, loads, now_s
        ):
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
        return tuple(chunks)

    def _in_order(self, jobs: dict[int, Job], now_s: float) -> list[Job]:
        if len(jobs) < 2:
            return list(jobs.values())
        order = self.policy.order
        return sorted(jobs.values(), key=lambda job: (order(job, now_s), job.id))

    def _left_s(self, job: Job) -> float:
        """Predicted time for the prompt's tokens that are not issued."""
        if job.issued == job.prompt:
            return 0.0
        return max(0.0, job.whole_s - self.prefill_time.until_s(job.issued))

    # --------------------------------------------------------------------- admission, preemption

    def _admit(self, now_s: float) -> None:
        """Place waiting requests in the policy's order.

        One without room is overtaken while it is in time; then only by short prompts, in the pages kept for
        them; and by nobody once it is as late again as it was to wait.
        """
        passed, late = 0, False
        for job in self._in_order(self.waiting, now_s):
            if late and (job.long or self._short_tokens + job.prompt > self._kept_tokens):
                continue
            if self._place(job, now_s):
                continue
            if passed == 0 and self._make_room(job, now_s) and self._place(job, now_s):
                continue
            passed += 1
            slack_s = job.slack_s(now_s)
            late |= slack_s <= 0
            if passed == MOST_OVERTAKEN or slack_s < -job.deadline_s:
                break
        self._retry_s = now_s + self.workload.tbt_s if self.waiting else -math.inf

    def _place(self, job: Job, now_s: float) -> bool:
        """Admit the job, where most of its prefix is if that is half of it, else on the emptiest home."""
        page_size = self.plan.page_size
        tokens = min(job.kv_tokens, job.prompt + OUTPUT_PAGES * page_size)
        hashes, most = job.hashes or (), (job.prompt - 1) // page_size  # one token must be computed
        spare = self._spare(tokens) if job.long else 0
        best: tuple[int, int, int, int] | None = None
        for home in range(self.growth.kvp):
            found = self.book.found(home, hashes, most)
            if self.book.fits(home, tokens, hashes, found, spare):
                worth = found if 2 * found * page_size >= job.prompt else 0
                choice = (worth, self.book.available(home), -home, found)
                best = choice if best is None else max(best, choice)
        if best is None:
            return False
        job.home, found = -best[2], best[3]
        job.sid = next(self._sids)
        pages = self.book.admit(job.sid, job.home, tokens, hashes[:found])
        job.issued = job.processed = job.cached = found * page_size
        self._cover(job, tokens)
        job.left_s = self._left_s(job)
        job.started_s = now_s if job.started_s is None else job.started_s
        self.counts.hit_tokens += job.issued
        del self.waiting[job.id]
        self.running[job.sid] = self._prefilling[job.sid] = job
        self.book.changes.append(Admitted(job, job.sid, job.home, job.generated, job.cached, pages))
        return True

    def _spare(self, tokens: int) -> int:
        """Pages on each group that a long prompt of so many tokens leaves free for short ones."""
        if not self.running:
            return 0
        page_tokens = self.plan.page_size * self.growth.kvp
        kept, held = self._kept_tokens // page_tokens, -(-self._short_tokens // page_tokens)
        return max(0, min(kept, self.plan.num_pages - max(self.book.needs(tokens))) - held)

    def _cover(self, job: Job, tokens: int) -> None:
        """The job has pages for so many tokens."""
        if not job.long:
            self._short_tokens += tokens - job.covered
        job.covered = tokens

    def _make_room(self, job: Job, now_s: float) -> bool:
        """Preempt prompts that have far more time than this one, if that is enough."""
        if self.policy.preempts is None:
            return False
        limit = self.policy.order(job, now_s) + self.policy.preempts
        victims = [
            other
            for other in reversed(self._in_order(self._prefilling, now_s))
            if self.policy.order(other, now_s) > limit and other.preemptions < MOST_PREEMPTIONS
        ]
        needs = max(self.book.needs(job.prompt + 1))
        held = sum(max(self.book.needs(other.covered)) for other in victims)
        most = max(self.book.available(group) for group in range(self.growth.kvp))
        if most + held < needs:
            return False
        for victim in victims:
            self._preempt(victim)
            if any(self.book.available(group) >= needs for group in range(self.growth.kvp)):
                return True
        return False

    def _extend(self, job: Job) -> None:
        """Pages for the next token; at need, of whoever came last: it may be the job itself."""
        tokens = min(job.kv_tokens, job.covered + self.plan.page_size)
        while (group := self.book.extend(job.sid, tokens)) is not None:
            holders = (one for one in self.running.values() if self.book.holds(one.sid, group))
            last = max(holders, key=lambda one: (one.arrival_s, one.id))
            self._preempt(last)
            if last is job:
                return
        self._cover(job, tokens)

    def _preempt(self, job: Job) -> None:
        """The job waits, to go on behind what it has generated."""
        self._leave(job, returns=True)
        job.prompt += job.tokens - job.generated
        job.generated = job.tokens
        job.issued = job.processed = job.cached = 0
        job.whole_s = job.left_s = self.prefill_time.until_s(job.prompt)
        job.preemptions += 1
        self.counts.preemptions += 1
        self.waiting[job.id] = job

    def _leave(self, job: Job, *, returns: bool = False) -> None:
        """A running job gives its pages back."""
        del self.running[job.sid]
        self._prefilling.pop(job.sid, None)
        self._ready.pop(job.sid, None)
        self.book.release(job.sid, returns=returns)
        self._cover(job, 0)
        job.sid = -1
        self._retry_s = -math.inf

    def _swap_from(self, cost: Cost) -> int | None:
        """Tokens before a page from which on two copies of it are quicker than computing it again."""
        page_size = self.plan.page_size
        copies_s = 2 * cost.swap_s(1)
        tokens = 0
        while tokens < self.workload.context and math.isfinite(copies_s):
            chunk = self.plan.chunk_at(tokens)
            rise_s = self.prefill_time.until_s(tokens + chunk) - self.prefill_time.until_s(tokens)
            if rise_s * page_size / chunk > copies_s:
                return tokens
            tokens = max(2 * tokens, page_size)
        return None
