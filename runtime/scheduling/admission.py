"""Who gets pages, and when: requests wait here until all of their prompt's are free, or are taken for them.

A request is admitted when it has all pages of its prompt, on all its groups, or it has none: growing
piecemeal could deadlock several long requests that each hold half. They come in the policy's order. One
without room is overtaken while it is in time; then only by short prompts, in the pages that long ones leave
to them; and by nobody once it is as late again as it was to wait. One that is in a hurry takes the place of
prompts that have far more time, if its policy preempts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ...artifact import Plan
from .growth import Growth
from .job import Admitted, Job
from .pages import PageBook
from .policies import Policy

OUTPUT_PAGES = 2
"""Pages that a request has at most beside its prompt's when it is admitted."""
SHORT_SHARE = 1 / 8
"""Of all pages, those that long prompts leave to short ones, and that these may take while one waits."""
MOST_PREEMPTIONS = 3
"""How often a prompt's pages may go to a more urgent one; then it keeps them."""
MOST_OVERTAKEN = 8
"""Waiting requests without room that are passed over in one go, in search of one that fits."""


@dataclass
class Admission:
    """The waiting requests, by id, and the book that their pages come from.

    again_s: between two attempts while neither pages nor requests have come; held: who must wait for now
    """

    plan: Plan
    growth: Growth
    book: PageBook
    policy: Policy
    again_s: float
    waiting: dict[int, Job] = field(default_factory=dict)
    held: frozenset[int] = frozenset()
    _sids: Iterator[int] = field(default_factory=itertools.count)
    _short_tokens: int = 0
    _retry_s: float = -math.inf

    def wait(self, job: Job) -> None:
        """The request has come, or come back."""
        self.waiting[job.id] = job
        self.retry()

    def retry(self) -> None:
        """There may be pages that were not there before."""
        self._retry_s = -math.inf

    def hold(self, ids: frozenset[int]) -> None:
        """These requests, by id, are not to run for now; all others may."""
        self.held = ids
        self.retry()

    def cover(self, job: Job, tokens: int) -> None:
        """The job has pages for so many tokens."""
        if not job.long:
            self._short_tokens += tokens - job.covered
        job.covered = tokens

    def release(self, job: Job, *, returns: bool) -> None:
        """The job gives its pages back. returns: it was preempted"""
        self.book.release(job.sid, returns=returns)
        self.cover(job, 0)
        job.sid = -1
        self.retry()

    def forget(self) -> None:
        """Nobody has any pages, and nothing is in them."""
        self.book.forget()
        self.retry()

    def admit(
        self, now_s: float, prefilling: Mapping[int, Job], preempt: Callable[[Job], None]
    ) -> list[Job]:
        """Whoever has pages from now on. prefilling, preempt: who may lose theirs, and how."""
        if now_s < self._retry_s:
            return []
        placed, passed, late = list[Job](), 0, False
        for job in in_order(self.policy, self.waiting, now_s):
            if job.id in self.held:
                continue
            if late and (job.long or self._short_tokens + job.prompt > self._kept_tokens):
                continue
            beside = itertools.chain(prefilling.values(), placed)
            if self._place(job, now_s, beside) or (
                not passed
                and self._make_room(job, now_s, prefilling, preempt)
                and self._place(job, now_s, prefilling.values())
            ):
                placed.append(job)
                continue
            passed += 1
            slack_s = job.slack_s(now_s)
            late |= slack_s <= 0
            if passed == MOST_OVERTAKEN or slack_s < -job.deadline_s:
                break
        self._retry_s = now_s + self.again_s if self.waiting else -math.inf
        return placed

    def home(self, job: Job, prompts: Iterable[Job]) -> tuple[int, int]:
        """Where a waiting job would live if it came now, and how many pages of its prompt are there; if it
        has no room, the emptiest home. prompts: those that are being prefilled"""
        groups = range(self.growth.kvp)
        return self._choice(job, prompts) or (max(groups, key=self.book.available), 0)

    def tokens(self, job: Job) -> int:
        """What it is to have pages for when it is admitted. Those that come together have not all as much
        beyond their prompts: else all of them would need their next pages in one step.
        """
        page_size = self.plan.page_size
        beyond = OUTPUT_PAGES * page_size - job.id % page_size
        return min(job.kv_tokens, job.prompt + beyond)

    def _choice(self, job: Job, prompts: Iterable[Job]) -> tuple[int, int] | None:
        """Where most of its prefix is if that is half of it, else the emptiest home that no long one of these
        prompts keeps busy, and how many pages of it are there; None: it has no room."""
        page_size, tokens = self.plan.page_size, self.tokens(job)
        hashes, most = job.hashes or (), (job.prompt - 1) // page_size  # one token must be computed
        spare = self._spare(tokens) if job.long else 0
        best: tuple[int, bool, int, int, int] | None = None
        busy = set[int]()
        if self.growth.kvp > 1:
            longs = [other for other in prompts if other.long]
            busy.update(*(self.growth.groups(one.home, one.issued + 1) for one in longs))
        for home in range(self.growth.kvp):
            found = self.book.found(home, hashes, most)
            if self.book.fits(home, tokens, hashes, found, spare):
                worth = found if 2 * found * page_size >= job.prompt else 0
                choice = (worth, home not in busy, self.book.available(home), -home, found)
                best = choice if best is None else max(best, choice)
        return None if best is None else (-best[3], best[4])

    def _place(self, job: Job, now_s: float, prompts: Iterable[Job]) -> bool:
        """Admit the job, if it has room. prompts: that are being computed"""
        choice = self._choice(job, prompts)
        if choice is None:
            return False
        page_size, tokens, hashes = self.plan.page_size, self.tokens(job), job.hashes or ()
        job.home, found = choice
        job.sid = next(self._sids)
        pages = self.book.admit(job.sid, job.home, tokens, hashes[:found])
        job.issued = job.processed = job.cached = found * page_size
        self.cover(job, tokens)
        job.started_s = now_s
        del self.waiting[job.id]
        self.book.changes.append(Admitted(job, job.sid, job.home, job.generated, job.cached, pages))
        return True

    @property
    def _kept_tokens(self) -> int:
        return int(SHORT_SHARE * self.plan.num_pages * self.growth.kvp) * self.plan.page_size

    def _spare(self, tokens: int) -> int:
        """Pages on each group that a long prompt of so many tokens leaves free for short ones."""
        if self.book.used_fraction == 0:
            return 0
        page_tokens = self.plan.page_size * self.growth.kvp
        kept, held = self._kept_tokens // page_tokens, -(-self._short_tokens // page_tokens)
        return max(0, min(kept, self.plan.num_pages - max(self.book.needs(tokens))) - held)

    def _make_room(
        self,
        job: Job,
        now_s: float,
        prefilling: Mapping[int, Job],
        preempt: Callable[[Job], None],
    ) -> bool:
        """Preempt prompts that have far more time than this one, if that is enough."""
        if self.policy.preempts is None:
            return False
        limit = self.policy.order(job, now_s) + self.policy.preempts
        victims = [
            other
            for other in reversed(in_order(self.policy, prefilling, now_s))
            if self.policy.order(other, now_s) > limit and other.preemptions < MOST_PREEMPTIONS
        ]
        needs, groups = max(self.book.needs(job.prompt + 1)), range(self.growth.kvp)
        held = sum(max(self.book.needs(other.covered)) for other in victims)
        if max(map(self.book.available, groups)) + held < needs:
            return False
        for victim in victims:
            preempt(victim)
            while self.book.tidy():  # all that it leaves counts, before the next one has to go
                pass
            if self._choice(job, prefilling.values()) is not None:
                return True
        return False


def in_order(policy: Policy, jobs: Mapping[int, Job], now_s: float) -> list[Job]:
    """As the policy has them go now; at a tie, as they came."""
    if len(jobs) < 2:
        return list(jobs.values())
    return sorted(jobs.values(), key=lambda job: (policy.order(job, now_s), job.id))
