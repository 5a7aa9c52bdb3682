"""One choice of everything but chunks, and what chunks can make of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .chunks import Floats
from .price import NEVER, Outlook

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One choice of everything but chunks. Arrays are [B, C].

    cost_s: sum of the slowest stage over the bucket's chunks; tau_s: the slowest chunk's;
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
    cost_s, tau_s = outlook.summed(np.maximum.reduce(outlook.stage_times(split)))
    fixed = max(outlook.stage_bytes(split))
    fits = fixed + outlook.activation_bytes <= usable_bytes
    keeps = len(split) * tau_s <= tbt_s
    allowed = outlook.chunks.samples.allowed & fits & keeps
    return Candidate(outlook, split, cost_s, tau_s, allowed, fixed)


def best_chunks(candidate: Candidate) -> tuple[float, NDArray[np.int64]] | None:
    """The exact optimum of one candidate: TTFT and a menu entry per bucket, or None if there is none.

    For each possible slowest chunk θ the best entry per bucket among those with τ ≤ θ is a minimum
    apart; the best θ is found by trying them all, in ascending order of τ.
    """
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
    total = least.sum(axis=0) + (candidate.stages - 1) * theta
    limit = theta[int(np.argmin(total))]
    within = np.where(allowed & (tau <= limit), cost, NEVER)
    choice = within.argmin(axis=1)
    return candidate.ttft_s(choice), choice


def lower_bound_s(candidate: Candidate) -> float:
    """No choice of chunks gives this candidate a TTFT below this."""
    allowed = candidate.allowed
    if not allowed.any(axis=1).all():
        return NEVER
    cost = np.where(allowed, candidate.cost_s, NEVER).min(axis=1).sum()
    fill = np.where(allowed, candidate.tau_s, NEVER).min(axis=1).max()
    return float(cost + (candidate.stages - 1) * fill + candidate.outlook.head_s)
