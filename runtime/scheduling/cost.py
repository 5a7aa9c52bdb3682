"""What the plan's cost.py says about a micro-batch, and about prefilling a prompt.

`Load` counts a micro-batch on one KVP group in the symbols of the IR. `Cost` is the seam: the
artifact's own cost function behind it, or a fake in tests.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Protocol

from ...artifact import Plan
from .growth import Growth

LATEST = 64
"""Predictions kept."""


@dataclass
class Load:
    """One micro-batch on one KVP group.

    T: rows; R: rows whose logits are wanted; QK: prefill query–key pairs on this group's shard;
    KV: cached tokens that prefill segments read (see `Growth.pieces`); KD: cached tokens that decodes read;
    X: partial rows swapped with KVP peers, sent or received, whichever are more.
    """

    T: int = 0
    R: int = 0
    QK: int = 0
    KV: int = 0
    KD: int = 0
    X: int = 0

    def add_decode(self, growth: Growth, shard: int, cached: int) -> None:
        """One sequence that appends a token after `cached` ones."""
        self.T += 1
        self.R += shard == growth.owner(cached)
        self.KD += growth.held(shard, cached + 1)
        self.X += growth.seen_by(cached + 1) - 1

    def add_chunk(self, growth: Growth, shard: int, cached: int, rows: int, ends: bool) -> None:
        """A prefill chunk; `ends`: it is the prompt's last."""
        self.T += rows
        if (
            growth.kvp == 1
        ):  # what the rest comes to, in fewer steps: this runs for every guess at a chunk
            self.R += ends
            self.QK += rows * cached + rows * (rows + 1) // 2
            self.KV += cached + rows
            return
        self.R += ends and shard == growth.owner(cached + rows - 1)
        self.QK += growth.pairs(shard, cached, rows)
        self.KV += growth.read(shard, cached, rows)
        self.X += rows * (growth.seen_by(cached + rows) - 1)

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

    def pace_s(self, load: Load) -> float:
        """What a chunk costs in a full pipeline: the time until the next one."""
        ...

    def crossing_s(self, load: Load) -> float:
        """Time to cross all stages: what a decode in it waits."""
        ...

    def swap_s(self, pages: int) -> float:
        """Copying so many KV pages of all layers to host memory, or back; infinite where none is kept."""
        ...


class PlanCost:
    """The artifact's cost.py as a `Cost`. The latest answers are kept: what was found while a micro-batch was
    packed is asked again when it is sent."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._pace_s = lru_cache(LATEST)(module.pace_s)
        self._crossing_s = lru_cache(LATEST)(module.crossing_s)

    def pace_s(self, load: Load) -> float:
        return float(self._pace_s(load.T, load.R, load.QK, load.KV, load.KD, load.X))

    def crossing_s(self, load: Load) -> float:
        return float(self._crossing_s(load.T, load.R, load.QK, load.KV, load.KD, load.X))

    def swap_s(self, pages: int) -> float:
        return float(self._module.swap_s(pages))


@dataclass(frozen=True)
class _Span:
    """`count` equal chunks from `start` on; their times rise evenly from first_s to last_s."""

    start: int
    chunk: int
    count: int
    before_s: float
    first_s: float
    last_s: float

    def until_s(self, count: float) -> float:
        """The end of its first `count` chunks."""
        rise_s = (self.last_s - self.first_s) / max(1, self.count - 1)
        return self.before_s + count * self.first_s + rise_s * count * (count - 1) / 2


class PrefillTime:
    """Predicted time to prefill the first n tokens of a prompt that has the engine to itself.

    C[n] is the sum of the pipeline's pace over the plan's chunks. A long context has too many
    chunks to price at start-up: in about `points` spans, the first and the last are priced, and
    those between lie on a line (attention's cost is linear in the context). A chunk that the
    prompt's end cuts short is priced by itself: small chunks cost more per token.
    """

    def __init__(
        self, plan: Plan, cost: Cost, growth: Growth, context: int, points: int = 128
    ) -> None:
        self._plan = plan
        self._cost = cost
        self._growth = growth
        self._spans: list[_Span] = []
        n, sum_s = 0, 0.0
        while n <= context:
            chunk = plan.chunk_at(n)
            rule_end = next((rule.end for rule in plan.chunks if n < rule.end), context + chunk)
            count = max(1, min(context // points // chunk, (rule_end - n) // chunk))
            first_s = self._chunk_s(n, chunk)
            last_s = self._chunk_s(n + (count - 1) * chunk, chunk) if count > 1 else first_s
            self._spans.append(_Span(n, chunk, count, sum_s, first_s, last_s))
            sum_s = self._spans[-1].until_s(count)
            n += count * chunk
        self._starts = [span.start for span in self._spans]

    def until_s(self, tokens: int) -> float:
        """C[tokens]."""
        span = self._span(tokens)
        whole, rest = divmod(tokens - span.start, span.chunk)
        return span.until_s(whole) + (self._chunk_s(tokens - rest, rest) if rest else 0.0)

    def left_s(self, whole_s: float, tokens: int) -> float:
        """Of a prompt that takes `whole_s`, what is left behind its first tokens: those of a chunk that is
        not whole count for their share of it, for more of it comes."""
        span = self._span(tokens)
        return max(0.0, whole_s - span.until_s((tokens - span.start) / span.chunk))

    def swap_from(self, cost: Cost, context: int) -> int | None:
        """Tokens before a page from which on two copies of it are quicker than computing it again."""
        page_size = self._plan.page_size
        copies_s = 2 * cost.swap_s(1)
        tokens = 0
        while tokens < context and math.isfinite(copies_s):
            chunk = self._plan.chunk_at(tokens)
            rise_s = self.until_s(tokens + chunk) - self.until_s(tokens)
            if rise_s * page_size / chunk > copies_s:
                return tokens
            tokens = max(2 * tokens, page_size)
        return None

    def _span(self, tokens: int) -> _Span:
        return self._spans[bisect.bisect_right(self._starts, tokens) - 1]

    def _chunk_s(self, cached: int, rows: int) -> float:
        """The pace of the busiest of the groups that the chunk goes to."""
        busiest_s = 0.0
        for shard in range(self._growth.seen_by(cached + rows)):
            load = Load()
            load.add_chunk(self._growth, shard, cached, rows, ends=False)
            busiest_s = max(busiest_s, self._cost.pace_s(load))
        return busiest_s
