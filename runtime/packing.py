"""Which prefill chunks join a micro-batch beside its decodes, and how many rows of each.

For every prompt, in the policy's order: as many rows as keep the whole micro-batch, with everything that is
in it already, within the TBT promise of its decodes, by the plan's cost function. Beside no decode: the
chunk that the plan has for that context. Of long prompts one at most is in a micro-batch on a group, and it
leaves room for others by its relative slack; short ones fill what is left.

The plan has memory for `max_rows` rows, and for logits of `max_batch` + 1 of them.

Where even the smallest chunk does not fit and nobody else has rows, it goes all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..artifact import Plan
from .cost import Cost, Load
from .growth import Growth
from .job import Job
from .policies import Policy

LEAST_ROWS = 16
"""The smallest chunk that does not end its prompt: fewer rows cost as much as these."""


TRIES = 3
"""Evaluations of the cost function in search of a chunk: more find a few rows more at most."""

NOTHING = Load()


@dataclass(frozen=True)
class Packed:
    """`rows` more of a prompt."""

    job: Job
    rows: int


class Packing(Protocol):
    """alone: whether prompts go without decodes in their micro-batch."""

    alone: bool

    def pack(
        self,
        prompts: Sequence[Job],
        decodes: Sequence[Job],
        loads: dict[int, Load],
        now_s: float,
    ) -> list[Packed]:
        """Chunks of prompts, which come in order; adds them to the loads of their groups."""
        ...


@dataclass(frozen=True)
class Adaptive:
    """mnemoc's own: what the head of this module says."""

    plan: Plan
    cost: Cost
    growth: Growth
    policy: Policy
    tbt_s: float
    alone: bool = False

    def pack(
        self,
        prompts: Sequence[Job],
        decodes: Sequence[Job],
        loads: dict[int, Load],
        now_s: float,
    ) -> list[Packed]:
        if not prompts:
            return []
        packed: list[Packed] = []
        left = self.plan.max_rows - len(decodes)
        ends_left = self.plan.max_batch + 1 - len(decodes)
        promise_s = min((job.tbt_s for job in decodes), default=self.tbt_s)
        budget_s = self._stretched_s(promise_s, prompts[0], decodes, now_s)
        long: set[int] = set()  # groups with a long prompt's chunk
        full: set[int] = set()  # groups where the next one in order did not fit
        for job in prompts:
            groups = {
                self.growth.group(job.home, shard)
                for shard in range(self.growth.seen_by(job.issued + 1))
            }
            if groups & full or (job.long and groups & long):
                continue
            allowed_s = budget_s
            if job.long and len(prompts) > 1:
                allowed_s *= 1 - min(self.policy.room, max(0.0, job.relative_slack(now_s)))
            most = min(left, job.prompt - job.issued - (not ends_left))
            if not decodes:
                most = min(most, self.plan.chunk_at(job.issued))
            if not most:
                continue
            rows, added = self._fitting(job, most, loads, allowed_s)
            if not rows:
                full |= groups
                if len(full) == self.growth.kvp:
                    break
                continue
            for group, load in added.items():
                loads[group] = loads[group] + load if group in loads else load
            if job.long:
                long |= added.keys()
            left -= rows
            ends_left -= job.issued + rows == job.prompt
            packed.append(Packed(job, rows))
            if left < LEAST_ROWS:
                break
        return packed

    def _stretched_s(
        self, promise_s: float, first: Job, decodes: Sequence[Job], now_s: float
    ) -> float:
        """What the micro-batch may take: more than the promise only for a prompt that is late already."""
        if self.policy.stretch <= 1 or not decodes or first.slack_s(now_s) > 0:
            return promise_s
        ahead_s = min(job.ahead_s(now_s) for job in decodes)
        return max(promise_s, min(ahead_s, self.policy.stretch * promise_s))

    def _fitting(
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


def chunk_loads(growth: Growth, job: Job, rows: int, ends: bool) -> dict[int, Load]:
    """What a prompt's next rows are to each group."""
    loads = {}
    for shard in range(growth.seen_by(job.issued + rows)):
        load = loads[growth.group(job.home, shard)] = Load()
        load.add_chunk(growth, shard, job.issued, rows, ends)
    return loads


def _rounded(rows: int) -> int:
    """Down to three binary digits: shapes that come again can be captured, and cost nothing to guess."""
    if rows < LEAST_ROWS:
        return rows
    step = max(LEAST_ROWS, 1 << (rows.bit_length() - 3))
    return rows // step * step
