"""One choice of everything but chunks, and what chunks can make of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .chunks import Floats
from .outlook import NEVER, Outlook

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One choice of everything but chunks. Arrays are [B, C].

    cost_s: sum of the pace over the bucket's chunks; tau_s: the slowest stage of the slowest of them;
    allowed: chunk sizes that make sense and keep the TBT and memory promises.
    """

    outlook: Outlook
    split: tuple[int, ...]
    cost_s: Floats
    tau_s: Floats
    allowed: Bools
    fixed_bytes: int

    @property
    def stages(self) -> int:
        return len(self.split)

    def ttft_s(self, choice: NDArray[np.int64]) -> float:
        """With menu entry choice[b] in bucket b."""
        rows = np.arange(len(choice))
        slowest = self.tau_s[rows, choice].max()
        total = self.cost_s[rows, choice].sum() + (self.stages - 1) * slowest
        return float(total + self.outlook.head_s)


def make_candidate(
    outlook: Outlook, split: tuple[int, ...], tbt_s: float, usable_bytes: int
) -> Candidate:
    """A split of a layout, with the chunk sizes that keep the TBT and memory promises."""
    cost_s, tau_s = outlook.summed(outlook.pace(split)), outlook.dearest(outlook.slowest(split))
    fixed = max(outlook.stage_bytes(split))
    fits = fixed + outlook.step_bytes <= usable_bytes
    keeps = len(split) * tau_s <= tbt_s
    allowed = outlook.chunks.samples.allowed & fits & keeps
    return Candidate(outlook, split, cost_s, tau_s, allowed, fixed)


@dataclass(frozen=True)
class Thresholds:
    """What each possible slowest chunk θ allows: the exact trade between buckets and pipeline fill.

    theta:   every allowed τ, ascending
    least_s: [B, Θ], the cheapest chunks per bucket among those with τ ≤ θ
    ttft_s:  [Θ], no plan whose slowest chunk takes θ has a TTFT below this, and the least of them is
             reached
    """

    theta: Floats
    least_s: Floats
    ttft_s: Floats


def thresholds(candidate: Candidate) -> Thresholds | None:
    """The candidate's thresholds, or None if some bucket has no chunk size at all."""
    tau, cost, allowed = candidate.tau_s, candidate.cost_s, candidate.allowed
    if not allowed.any(axis=1).all():
        return None
    bucket, entry = np.nonzero(allowed)
    order = np.argsort(tau[bucket, entry], kind="stable")
    bucket, entry = bucket[order], entry[order]
    theta = tau[bucket, entry]
    least = np.full((tau.shape[0], len(order)), NEVER)
    least[bucket, np.arange(len(order))] = cost[bucket, entry]
    np.minimum.accumulate(least, axis=1, out=least)
    fill = (candidate.stages - 1) * theta
    return Thresholds(theta, least, least.sum(axis=0) + fill + candidate.outlook.head_s)


def best_chunks(candidate: Candidate) -> tuple[float, NDArray[np.int64]] | None:
    """The exact optimum of one candidate: TTFT and a menu entry per bucket, or None if there is none."""
    found = thresholds(candidate)
    if found is None:
        return None
    limit = found.theta[int(np.argmin(found.ttft_s))]
    within = candidate.allowed & (candidate.tau_s <= limit)
    choice = np.where(within, candidate.cost_s, NEVER).argmin(axis=1)
    return candidate.ttft_s(choice), choice


@dataclass(frozen=True)
class Useful:
    """What a TTFT within a limit leaves possible: menu entries per bucket, and the least slowest chunk."""

    entries: tuple[NDArray[np.int64], ...]
    least_slowest_s: float


def useful(candidate: Candidate, limit_s: float) -> Useful | None:
    """Entries with which the limit can still be kept, or None if it cannot.

    The slowest chunk must be a θ with TTFT(θ) within the limit; an entry of bucket b then costs its σ, at
    least the cheapest chunks of the other buckets, and a fill of its own τ or of the least such θ.
    """
    found = thresholds(candidate)
    limit_s *= 1 + 1e-9
    if found is None or not (found.ttft_s <= limit_s).any():
        return None
    within = np.flatnonzero(found.ttft_s <= limit_s)
    low, high = found.theta[within[0]], found.theta[within[-1]]
    least = found.least_s[:, within[-1]]
    fill = (candidate.stages - 1) * np.maximum(candidate.tau_s, low)
    rest = least.sum() - least[:, None] + candidate.outlook.head_s
    keeps = candidate.allowed & (candidate.tau_s <= high)
    keeps &= rest + candidate.cost_s + fill <= limit_s
    return Useful(tuple(np.flatnonzero(row) for row in keeps), float(low))
