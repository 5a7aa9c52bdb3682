"""What the plan's cost.py says about a micro-batch, and about prefilling a prompt.

`Load` counts a micro-batch on one KVP group in the symbols of the IR. `Cost` is the seam: the
artifact's own cost function behind it, or a fake in tests.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from ..artifact import Plan
from .growth import Growth


@dataclass
class Load:
    """One micro-batch on one KVP group.

    T: rows; R: rows whose logits are wanted; QK: prefill query–key pairs on this group's shard;
    KV: cached tokens that prefill segments read; KD: cached tokens that decodes read;
    X: partial rows received from KVP peers.
    """

    T: int = 0
    R: int = 0
    QK: int = 0
    KV: int = 0
    KD: int = 0
    X: int = 0

    def add_decode(self, growth: Growth, shard: int, cached: int) -> None:
        """One sequence that appends a token after `cached` ones."""
        peers = growth.owner(cached)
        self.T += 1
        self.R += shard == peers
        self.KD += growth.held(shard, cached + 1)
        self.X += peers

    def add_chunk(self, growth: Growth, shard: int, cached: int, rows: int, ends: bool) -> None:
        """A prefill chunk; `ends`: it is the prompt's last."""
        peers = growth.owner(cached + rows - 1)
        self.T += rows
        self.R += ends and shard == peers
        self.QK += growth.pairs(shard, cached, rows)
        self.KV += growth.held(shard, cached + rows)
        self.X += rows * peers

    def __add__(self, other: Load) -> Load:
        return Load(
            self.T + other.T,
            self.R + other.R,
            self.QK + other.QK,
            self.KV + other.KV,
            self.KD + other.KD,
            self.X + other.X,
        )


class Cost(Protocol):
    """Predicted seconds of a micro-batch."""

    def slowest_s(self, load: Load) -> float:
        """Time of the slowest stage: what a chunk costs in a full pipeline."""
        ...

    def crossing_s(self, load: Load) -> float:
        """Time to cross all stages: what a decode in it waits."""
        ...


@dataclass(frozen=True)
class PlanCost:
    """The artifact's cost.py as a `Cost`."""

    module: ModuleType

    def slowest_s(self, load: Load) -> float:
        return float(self.module.slowest_s(load.T, load.R, load.QK, load.KV, load.KD, load.X))

    def crossing_s(self, load: Load) -> float:
        return float(self.module.crossing_s(load.T, load.R, load.QK, load.KV, load.KD, load.X))


class PrefillTime:
    """Predicted time to prefill the first n tokens of a prompt that has the engine to itself.

    C[n] is the sum of the slowest stage's time over the plan's chunks, sampled at `points` contexts
    and interpolated between them: a long context has too many chunks to sum at start-up.
    """

    def __init__(
        self, plan: Plan, cost: Cost, growth: Growth, context: int, points: int = 128
    ) -> None:
        step = max(1, context // points)
        self._at = [0]
        self._sum_s = [0.0]
        while self._at[-1] < context:
            n = self._at[-1]
            chunk = plan.chunk_at(n)
            busiest = 0.0
            for shard in range(growth.shards(n + chunk)):
                load = Load()
                load.add_chunk(growth, shard, n, chunk, ends=False)
                busiest = max(busiest, cost.slowest_s(load))
            width = max(chunk, step)
            self._at.append(n + width)
            self._sum_s.append(self._sum_s[-1] + busiest * width / chunk)

    def until_s(self, tokens: int) -> float:
        """C[tokens]."""
        index = min(bisect.bisect_right(self._at, tokens), len(self._at) - 1)
        low, high = self._at[index - 1], self._at[index]
        part = (tokens - low) / (high - low)
        return self._sum_s[index - 1] + part * (self._sum_s[index] - self._sum_s[index - 1])

    def remaining_s(self, done: int, total: int) -> float:
        return max(0.0, self.until_s(total) - self.until_s(done))
