"""Which prefill chunks join a micro-batch beside its decodes, and how many rows of each.

For every prompt as many rows as keep the whole micro-batch, with everything that is in it already, within a
time, by the plan's cost function; beside no decode, no more than the plan's own chunk for that context. The
time is the TBT promise of the decodes, over what one micro-batch in a hundred was seen to take beyond its
prediction (`overrun`): so 99 % keep the promise also where predictions are off. It is less where a decode is
behind its promise. For a prompt that is late already it is more, while every decode that runs is so far ahead
of its own promise that none of its tokens will be late, and has not lent time before for one token in
LENT_EACH.

Prompts come in the policy's order. On a group one long prompt at most is in a micro-batch. Where the policy
has room for short ones, they are packed first: those before the long one in order as far as the time goes,
those behind it into a share of it; the long one has all that is left.

The plan has memory for `max_rows` rows, and for logits of `max_batch` + 1 of them. Where even the smallest
chunk does not fit and nobody else has rows, it goes all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from ...artifact import Plan
from .cost import Cost, Load
from .growth import Growth
from .job import Job
from .overrun import Overrun
from .policies import Policy

LEAST_ROWS = 16
"""The smallest chunk that does not end its prompt: fewer rows cost as much as these."""

TRIES = 3
"""Evaluations of the cost function in search of a chunk: more find a few rows more at most."""

LENT_EACH = 128
"""Tokens of a decode for each that it may wait for longer than promised."""

LEAST_SHARE = 0.5
"""Of the TBT promise, what prompts may use even where decodes are behind it."""

NOTHING = Load()


@dataclass(frozen=True)
class Packed:
    """`rows` more of a prompt."""

    job: Job
    rows: int


class Packing(Protocol):
    """alone: whether prompts go without decodes in their micro-batch; apart: whether KVP groups have
    micro-batches of their own, where no request ties them together."""

    alone: bool
    apart: bool

    def pack(
        self,
        prompts: Sequence[Job],
        decodes: Sequence[Job],
        loads: dict[int, Load],
        groups: Set[int],
        now_s: float,
    ) -> list[Packed]:
        """Chunks of prompts, which come in order, on these groups; adds them to the groups' loads."""
        ...


@dataclass(frozen=True)
class Adaptive:
    """mnemoc's own: what the head of this module says."""

    plan: Plan
    cost: Cost
    growth: Growth
    policy: Policy
    tbt_s: float
    running: Mapping[int, Job]
    overrun: Overrun
    alone: bool = False
    apart: bool = True

    def pack(
        self,
        prompts: Sequence[Job],
        decodes: Sequence[Job],
        loads: dict[int, Load],
        groups: Set[int],
        now_s: float,
    ) -> list[Packed]:
        if not prompts:
            return []
        allowed_s = self._allowed_s(prompts[0], decodes, groups, now_s)
        filling = _Filling(self, decodes, loads, groups)
        at = next((i for i, job in enumerate(prompts) if job.long), len(prompts))
        if at == len(prompts) or not self.policy.room:
            filling.add(prompts, allowed_s)
            return filling.packed
        filling.add(prompts[:at], allowed_s)
        behind = [job for job in prompts[at:] if not job.long]
        if behind:
            slack = prompts[at].relative_slack(now_s)
            share = min(self.policy.room, max(self.policy.least_room, slack))
            used_s = max(map(self.cost.crossing_s, loads.values()), default=0.0)
            filling.add(behind, used_s + share * (allowed_s - used_s))
        filling.full.clear()
        filling.add([job for job in prompts[at:] if job.long], allowed_s)
        return filling.packed

    def _allowed_s(
        self, first: Job, decodes: Sequence[Job], groups: Set[int], now_s: float
    ) -> float:
        """What the micro-batch may take."""
        if not decodes:
            return self.tbt_s / self.overrun.ratio
        promise_s = min([job.tbt_s for job in decodes])
        ahead_s = min([job.due_s for job in decodes]) - now_s
        if self.policy.stretch > 1 and first.slack_s(now_s) <= 0:
            most_s = self._lent_s(self.policy.stretch * promise_s, groups, now_s)
            if most_s > promise_s:
                return most_s
        return max(LEAST_SHARE * promise_s, min(promise_s / self.overrun.ratio, ahead_s))

    def _lent_s(self, wanted_s: float, groups: Set[int], now_s: float) -> float:
        """What all that decode there can lend: half of what each has, for some wait for this one and then
        cross."""
        lenders = [job for job in self.running.values() if job.issued == job.prompt]
        if len(groups) < self.growth.kvp:
            tied = self.growth.groups
            lenders = [job for job in lenders if not groups.isdisjoint(tied(job.home, job.cached))]
        if any(job.lent * LENT_EACH >= job.tokens for job in lenders):
            return 0.0
        for job in lenders:
            job.lent += 1
        return min(wanted_s, (min([job.due_s for job in lenders]) - now_s) / 2)

    def fitting(
        self, job: Job, most: int, loads: Mapping[int, Load], allowed_s: float
    ) -> tuple[int, dict[int, Load]]:
        """The most rows that keep every group within the time, and what they add to each; 0: none do.

        Predicted time is convex in the rows (maxima of sums that are linear, or quadratic in attention), so
        the chord between a count that fits and one that does not meets the limit at one that fits.
        """
        ends = job.prompt - job.issued
        added = chunk_loads(self.growth, job, most, most == ends)
        over = self._over(loads, added, allowed_s)
        if over <= 1:
            return most, added
        alone = loads.keys().isdisjoint(added)
        low, high, best = 0, most, added
        under = self._over(loads, dict.fromkeys(added, NOTHING), allowed_s)
        for _ in range(TRIES):
            if under >= 1:
                break
            rows = _rounded(low + int((high - low) * (1 - under) / (over - under)))
            if rows <= low:
                break
            tried = chunk_loads(self.growth, job, rows, ends=False)
            ratio = self._over(loads, tried, allowed_s)
            if ratio <= 1:
                low, under, best = rows, ratio, tried
            else:
                high, over = rows, ratio
        if low >= LEAST_ROWS:
            return low, best
        if not alone:
            return 0, {}
        low = min(LEAST_ROWS, most)
        return low, chunk_loads(self.growth, job, low, low == ends)

    def _over(
        self, loads: Mapping[int, Load], added: Mapping[int, Load], allowed_s: float
    ) -> float:
        """The predicted time of the busiest group over what is allowed."""
        crossing_s = max(
            self.cost.crossing_s(loads[group] + load if group in loads else load)
            for group, load in added.items()
        )
        return crossing_s / allowed_s


class _Filling:
    """A micro-batch as prompts join it. full: groups where the next one in order did not fit."""

    def __init__(
        self, by: Adaptive, decodes: Sequence[Job], loads: dict[int, Load], groups: Set[int]
    ) -> None:
        self.packed: list[Packed] = []
        self.full: set[int] = set()
        self._by = by
        self._groups = groups
        self._decodes = bool(decodes)
        self._loads = loads
        self._rows_left = by.plan.max_rows - len(decodes)
        self._logits_left = by.plan.max_batch + 1 - len(decodes)
        self._long: set[int] = set()  # groups with a long prompt's chunk

    def add(self, prompts: Sequence[Job], allowed_s: float) -> None:
        """As much of the prompts as the micro-batch may take, one after the other."""
        by, growth = self._by, self._by.growth
        for job in prompts:
            if self._rows_left < LEAST_ROWS or len(self.full) == len(self._groups):
                return
            groups = growth.groups(job.home, job.issued + 1)
            most = job.prompt - job.issued - (not self._logits_left)
            if job.prompt > (end := growth.within(job.home, self._groups)):
                most = min(most, int(end) - job.issued)
            if not self._decodes:
                most = min(most, by.plan.chunk_at(job.issued))
            if most > self._rows_left:
                most = _rounded(self._rows_left)
            if groups & self.full or (job.long and groups & self._long) or not most:
                continue
            rows, added = by.fitting(job, most, self._loads, allowed_s)
            if rows:
                self._join(job, rows, added)
            else:
                self.full |= groups

    def _join(self, job: Job, rows: int, added: Mapping[int, Load]) -> None:
        loads = self._loads
        for group, load in added.items():
            loads[group] = loads[group] + load if group in loads else load
        if job.long:
            self._long |= added.keys()
        self._rows_left -= rows
        self._logits_left -= job.issued + rows == job.prompt
        self.packed.append(Packed(job, rows))


def chunk_loads(growth: Growth, job: Job, rows: int, ends: bool) -> dict[int, Load]:
    """What a prompt's next rows are to each group."""
    loads = {}
    for shard in range(growth.seen_by(job.issued + rows)):
        load = loads[growth.group(job.home, shard)] = Load()
        load.add_chunk(growth, shard, job.issued, rows, ends)
    return loads


def add_decodes(growth: Growth, jobs: Collection[Job], loads: dict[int, Load]) -> None:
    """What the next row of each is to each group, in few steps: there are thousands of these a second."""
    if growth.kvp == 1 and jobs:
        only = loads.setdefault(0, Load())
        only.T += len(jobs)
        only.R += len(jobs)
        only.KD += sum([job.cached for job in jobs]) + len(jobs)
        return
    one_group = 0 if growth.helix else growth.stripe_tokens
    for job in jobs:
        cached = job.cached
        if cached < one_group:  # the common case
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


def _rounded(rows: int) -> int:
    """Down to four binary digits: shapes that come again can be captured, and 3 % of the time stays empty;
    with three digits, 6 %."""
    if rows < LEAST_ROWS:
        return rows
    step = max(LEAST_ROWS, 1 << (rows.bit_length() - 4))
    return rows // step * step
