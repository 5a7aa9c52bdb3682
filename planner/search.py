"""Finds the plan: prices the space from cheap bounds to exact optima, then lets the solver prove it.

Bounds discard only what cannot win: decodes alone slower than the TBT promise, weights and KV that do
not fit even in perfectly balanced stages, a TTFT bound (perfect balance, no trade between buckets)
beyond the promise or beyond a plan already found. What survives goes to the solver together.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..layout import Layout
from .candidate import Candidate, best_chunks, make_candidate, useful
from .outlook import NEVER, Outlook
from .price import Pricer
from .space import Pins, growths, layouts

if TYPE_CHECKING:
    from .milp import Solution

_ROUNDING = 1 + 1e-9  # a bound may be reached: it is then another sum of the same seconds


@dataclass(frozen=True)
class Promise:
    """What a plan must keep: its times, and the devices that it may use."""

    ttft_s: float
    tbt_s: float
    devices: int


@dataclass(frozen=True)
class Finding:
    """A candidate with its best chunks."""

    candidate: Candidate
    choice: NDArray[np.int64]
    ttft_s: float

    @property
    def outlook(self) -> Outlook:
        return self.candidate.outlook

    @property
    def tbt_s(self) -> float:
        """What decodes see at worst: alone at full length, or riding with the dearest chunk."""
        return self.kept_tbt_s if self.outlook.rides else self.outlook.decode_s

    @property
    def kept_tbt_s(self) -> float:
        """The least TBT promise that it keeps, also for decodes of others beside a prompt alone."""
        rows = np.arange(len(self.choice))
        slowest = float(self.candidate.tau_s[rows, self.choice].max())
        return max(self.outlook.decode_s, self.candidate.stages * slowest)


class Search:
    """The space of one model, cluster and workload, priced as far as it has been looked at.

    Nothing that was priced is priced again: other promises and more devices go on from there.
    """

    def __init__(self, pricer: Pricer, pinned: Pins) -> None:
        self.pricer, self.pinned = pricer, pinned
        self._layouts: tuple[Layout, ...] = ()
        self._least_tbt_s, self._least_ttft_s = np.empty(0), np.empty(0)
        self._reach = 0
        self._grown: dict[Layout, tuple[Outlook, ...]] = {}
        self._fits: dict[int, bool] = {}
        self._bounds: dict[tuple[int, float], float] = {}
        self._bests: dict[tuple[int, float], Finding | None] = {}

    def layouts(self, devices: int) -> tuple[Layout, ...]:
        """Those of at most so many devices, by GPUs."""
        if devices > self._reach:
            pricer = self.pricer
            found = layouts(pricer.spec, pricer.cluster, devices, self.pinned)
            more = tuple(layout for layout in found if layout.gpus > self._reach)
            tbt_s, ttft_s = pricer.bounds(more)
            self._layouts += more
            self._least_tbt_s = np.concatenate([self._least_tbt_s, tbt_s])
            self._least_ttft_s = np.concatenate([self._least_ttft_s, ttft_s])
            self._reach = devices
        return self._layouts[: bisect_right(self._layouts, devices, key=lambda one: one.gpus)]

    def grown(self, layout: Layout) -> tuple[Outlook, ...]:
        """A layout with each of its growths."""
        if layout not in self._grown:
            choices = growths(layout, self.pricer.workload, self.pinned)
            self._grown[layout] = tuple(self.pricer.outlook(layout, growth) for growth in choices)
        return self._grown[layout]

    def outlooks(
        self, devices: int, tbt_s: float = NEVER, ttft_s: float = NEVER
    ) -> tuple[Outlook, ...]:
        """Layouts with their growth of at most so many devices, by GPUs; of those layouts whose bounds
        leave both times possible.
        """
        few = self.layouts(devices)
        possible = self._possible(len(few), tbt_s, ttft_s)
        return tuple(outlook for i in possible for outlook in self.grown(few[i]))

    def near(self, devices: int, tbt_s: float) -> tuple[Layout, ...]:
        """Layouts of at most so many devices whose bound leaves the TBT possible, by that on TTFT."""
        few = self.layouts(devices)
        possible = self._possible(len(few), tbt_s, NEVER)
        quickest = np.argsort(self._least_ttft_s[possible], kind="stable")
        return tuple(few[i] for i in possible[quickest])

    def _possible(self, first: int, tbt_s: float, ttft_s: float) -> NDArray[np.intp]:
        """Which of the first layouts have bounds within both times."""
        may = self._least_tbt_s[:first] <= tbt_s * _ROUNDING
        return np.flatnonzero(may & (self._least_ttft_s[:first] <= ttft_s * _ROUNDING))

    def fits(self, outlook: Outlook) -> bool:
        """Whether perfectly balanced stages would hold weights, KV and what decodes alone need."""
        key = id(outlook)
        if key not in self._fits:
            self._fits[key] = balanced_bytes(outlook) <= self.pricer.cluster.usable_bytes
        return self._fits[key]

    def possible(self, outlook: Outlook, tbt_s: float) -> bool:
        """Decodes alone keep TBT, and memory holds what they need."""
        return outlook.decode_s <= tbt_s and self.fits(outlook)

    def bound_s(self, outlook: Outlook, tbt_s: float) -> float:
        """A bound on TTFT with the TBT promise kept; NEVER if it cannot be."""
        key = (id(outlook), tbt_s)
        if key not in self._bounds:
            possible = self.possible(outlook, tbt_s)
            self._bounds[key] = outlook.bound_s(tbt_s * _ROUNDING) if possible else NEVER
        return self._bounds[key]

    def within(self, outlook: Outlook, tbt_s: float, limit_s: float) -> bool:
        """Whether bounds, the cheap one first, leave a TTFT within the limit possible."""
        limit_s *= _ROUNDING
        return (
            outlook.floor_s <= limit_s
            and self.possible(outlook, tbt_s)
            and self.bound_s(outlook, tbt_s) <= limit_s
        )

    def best(self, outlook: Outlook, tbt_s: float) -> Finding | None:
        """The exact optimum of TTFT over the layout's splits and chunks."""
        key = (id(outlook), tbt_s)
        if key not in self._bests:
            self._bests[key] = None
            if self.bound_s(outlook, tbt_s) < NEVER:
                self._bests[key] = self._best_split(outlook, tbt_s)
        return self._bests[key]

    def candidate(self, outlook: Outlook, split: tuple[int, ...], tbt_s: float) -> Candidate:
        return make_candidate(outlook, split, tbt_s, self.pricer.cluster.usable_bytes)

    def _best_split(self, outlook: Outlook, tbt_s: float) -> Finding | None:
        found: Finding | None = None
        for split in outlook.splits():
            candidate = self.candidate(outlook, split, tbt_s)
            best = best_chunks(candidate)
            if best is not None and (found is None or best[0] < found.ttft_s):
                found = Finding(candidate, best[1], best[0])
        return found

    def fastest(self, outlooks: Iterable[Outlook], tbt_s: float, limit_s: float) -> Finding | None:
        """The least TTFT among some layouts, if any is within the limit."""
        quick = [o for o in outlooks if o.decode_s <= tbt_s]  # what memory holds is asked of few
        found: Finding | None = None
        for outlook in sorted(quick, key=lambda o: (o.floor_s, o.gpus)):
            limit_s = limit_s if found is None else found.ttft_s
            if outlook.floor_s > limit_s * _ROUNDING:
                break
            if not self.within(outlook, tbt_s, limit_s):
                continue
            best = self.best(outlook, tbt_s)
            if best is None or best.ttft_s > limit_s:
                continue
            if found is None or (best.ttft_s, best.outlook.gpus) < (
                found.ttft_s,
                found.outlook.gpus,
            ):
                found = best
        return found

    def rank(self, outlook: Outlook, objective: str) -> float:
        """The named objective, as far as it does not depend on chunks: smaller is better."""
        if objective == "gpus":
            return float(outlook.gpus)
        if objective == "throughput":
            return -outlook.growth.concurrency / outlook.decode_s
        return 0.0

    def find(self, promise: Promise, objective: str) -> Solution | None:
        """The optimal plan, proven by the solver; None if no plan keeps the promise."""
        from .milp import Problem, solve  # only here: prices need no solver

        incumbent = self.incumbent(promise, objective)
        if incumbent is None:
            return None
        best_rank = self.rank(incumbent.outlook, objective)
        pool: list[tuple[Candidate, float]] = []
        for outlook in self.outlooks(promise.devices, promise.tbt_s, promise.ttft_s):
            rank = self.rank(outlook, objective)
            if rank > best_rank:
                continue
            limit = promise.ttft_s if rank < best_rank else incumbent.ttft_s
            if not self.within(outlook, promise.tbt_s, limit):
                continue
            for split in outlook.splits():
                candidate = self.candidate(outlook, split, promise.tbt_s)
                if useful(candidate, limit) is not None:
                    pool.append((candidate, limit))
        candidates, limits = zip(*pool, strict=True)
        problem = Problem(
            objective=objective,
            candidates=candidates,
            limits=limits,
            ttft_s=promise.ttft_s,
            tbt_s=promise.tbt_s,
            usable_bytes=self.pricer.cluster.usable_bytes,
            devices=promise.devices,
        )
        return solve(problem)

    def incumbent(self, promise: Promise, objective: str) -> Finding | None:
        """A plan that keeps the promise and is best by exact search, layout by layout."""
        space = self.outlooks(promise.devices, promise.tbt_s, promise.ttft_s)
        ranked = sorted(space, key=lambda o: self.rank(o, objective))
        for _, group in itertools.groupby(ranked, key=lambda o: self.rank(o, objective)):
            found = self.fastest(group, promise.tbt_s, promise.ttft_s)
            if found is not None:
                return found
        return None


def balanced_bytes(outlook: Outlook) -> float:
    """Of the fullest rank, whatever the split and the chunks: a lower bound."""
    stages, layers = outlook.layout.spp, outlook.num_layers
    ends = outlook.footprint.embed + outlook.footprint.head
    tallest = math.ceil(layers / stages) * outlook.layer_bytes
    even = (ends + layers * outlook.layer_bytes) / stages
    return max(tallest, even) + outlook.decode_bytes
