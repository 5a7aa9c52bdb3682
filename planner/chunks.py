"""Context buckets, the menu of chunk sizes, and what one chunk asks of the busiest KVP group.

Legend: n tokens cached before the chunk, c its tokens, M tokens of a stripe, k groups, B buckets, C menu.

**Buckets** cut the context [0, N) at multiples of one unit u, growing geometrically: later buckets
are about a fifth of what lies before them. u = 16·{120, 360, 840} has many divisors, and the menu is
those divisors that are multiples of 16, so chunks of any planned size tile their bucket and each
bucket's first chunk starts where the bucket does, without the scheduler having to cut any short.

**Stripes**: a request's tokens are dealt to the groups M at a time. The busiest group is its home, the
first: for each query it holds at least as many visible keys as any other. Of the first y tokens it holds

    h(y) = (y ÷ kM)·M + min(y mod kM, M)

which is min(y, M) where they go round only once (*contiguous*: M ≥ N/k). So a chunk has there

    QK = S(n + c) − S(n),   S(y) = Σ_{x≤y} h(x)      exact
    KV = h(n + c)                                    exact, for a chunk within one stripe
    G  = min(k, (n + c − 1) ÷ M + 1)                 active groups
    X  = c·(G − 1)                                   partial rows swapped with peers

Under helix all k groups compute every row, G = k, and the decodes that ride are those of all requests: for
those that hold no tokens on the busiest group, rows without keys (`Riders.blind`).

**The sum over a bucket** uses few samples: the first and the last whole chunk of each of its two parts, and
the rest chunk. The parts meet where one more group joins, or else in the middle. All chunks of a part have
one size and, but for further groups that join, one T and X; their time is a maximum of affine functions of
(QK, KV), so convex. The line through the first and the last, at each chunk's own QK, bounds it from above;
and as ΣQK telescopes to S(end) − S(start), the two get the weights with which their QK has the exact sum.
So the sum is exact where time is affine, as it is wherever one resource bounds, whether keys grow evenly
(contiguous) or stripe by stripe. KV is a line over QK where all of a part's chunks, or none, lie on the home
group; with stripes it need not be, and each sample takes the line KV = QK/c + (c − 1)/2 instead, which
bounds KV (h grows by at most one a token) and is off by less than half a chunk. Where further groups join
within a part, its last, dearest chunk stands for all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRAIN = 16
_UNITS = (120 * GRAIN, 360 * GRAIN, 840 * GRAIN)


@dataclass(frozen=True)
class Grid:
    """Buckets (starts, ends) and the menu of chunk sizes, ascending."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    menu: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts), len(self.menu)


@dataclass(frozen=True)
class Samples:
    """Per sample, bucket and menu entry [5, B, C]: chunk start, size and weight in the bucket's sum.

    allowed: [B, C], whether the menu entry makes sense in the bucket.
    """

    start: Floats
    size: Floats
    weight: Floats
    allowed: NDArray[np.bool_]


@dataclass(frozen=True)
class Sizes:
    """The six quantities of a micro-batch on the busiest group (see `ir.sizes`), and active groups."""

    T: Floats
    R: Floats
    QK: Floats
    KV: Floats
    KD: Floats
    X: Floats


@dataclass(frozen=True)
class Riders:
    """Decodes that share the batch on the busiest group: how many, tokens each, groups that compute each.

    blind: further ones that it computes without holding any token of theirs
    """

    count: int
    tokens: int
    groups: int
    blind: int = 0

    @property
    def rows(self) -> int:
        return self.count + self.blind

    @property
    def swapped(self) -> int:
        """Partial rows that the group swaps with its peers."""
        return self.rows * (self.groups - 1)


@dataclass(frozen=True)
class Spread:
    """How a request lies on KVP groups: dealt `stripe` tokens at a time, and how many compute its rows.

    ring: groups that the stripes go round, or None where they do not go round twice
    groups: all of them compute (helix), or None: those that hold any of its tokens
    """

    stripe: int
    ring: int | None = None
    groups: int | None = None

    def active(self, end: Floats) -> Floats:
        """Groups that hold any of a request's first `end` tokens."""
        stripes = np.floor((end - 1) / self.stripe) + 1
        return np.asarray(stripes if self.ring is None else np.minimum(stripes, self.ring))

    def computing(self, end: Floats) -> Floats:
        """Groups that compute the last of a request's first `end` tokens."""
        return self.active(end) if self.groups is None else np.full_like(end, self.groups)

    def held(self, tokens: Floats) -> Floats:
        """h: how many of a request's first `tokens` tokens its home group holds."""
        rounds, rest = self._rounds(tokens)
        return np.asarray(rounds * self.stripe + np.minimum(rest, self.stripe))

    def pairs(self, end: Floats) -> Floats:
        """S: keys on the home group that a request's first `end` queries see in all."""
        rounds, rest = self._rounds(end)
        once = _triangle(rest, self.stripe)
        if self.ring is None:
            return once
        each = _triangle(np.asarray(float(self.ring * self.stripe)), self.stripe)
        before = self.ring * self.stripe * rounds * (rounds - 1) / 2 + rest * rounds
        return np.asarray(rounds * each + before * self.stripe + once)

    def _rounds(self, tokens: Floats) -> tuple[Floats, Floats]:
        """Complete rounds, and tokens of the last one."""
        if self.ring is None:
            return np.zeros_like(tokens), tokens
        rounds = np.floor(tokens / (self.ring * self.stripe))
        return rounds, tokens - rounds * self.ring * self.stripe


def chunk_unit(context: int) -> int:
    """u: what all chunk sizes divide, for prompts of up to `context` tokens."""
    return next((u for u in _UNITS if 8 * u >= context), _UNITS[-1])


def make_grid(context: int) -> Grid:
    """Buckets and menu for prompts of up to `context` tokens."""
    unit = chunk_unit(context)
    cuts, step = [0], 1
    while cuts[-1] < context:
        cuts.append(cuts[-1] + step * unit)
        done = cuts[-1] // unit
        step = max(1, 1 << max(0, done.bit_length() - 3))
    cuts[-1] = context
    menu = tuple(c for c in range(GRAIN, unit + 1, GRAIN) if unit % c == 0)
    return Grid(tuple(cuts[:-1]), tuple(cuts[1:]), menu)


def sample(grid: Grid, spread: Spread) -> Samples:
    """The samples and weights that stand for all chunks of each (bucket, chunk size).

    Chunks that would cross from one stripe into the next are not allowed where stripes go round.
    """
    starts, ends = (np.array(side, dtype=float)[:, None] for side in (grid.starts, grid.ends))
    menu = np.array(grid.menu, dtype=float)[None, :]
    length = ends - starts
    whole = np.floor(length / menu)
    rest = length - whole * menu
    joins = spread.active(ends) > spread.active(starts + 1)
    until_more_groups = (np.floor(starts / spread.stripe) + 1) * spread.stripe - starts
    before = np.where(joins, until_more_groups, length / 2)
    cut = np.minimum(np.floor(before / menu), whole)
    start = np.stack(
        [
            np.broadcast_to(starts, cut.shape),
            starts + np.maximum(cut - 1, 0) * menu,
            starts + np.minimum(cut, np.maximum(whole - 1, 0)) * menu,
            starts + np.maximum(whole - 1, 0) * menu,
            starts + whole * menu,
        ]
    )
    size = np.stack([*(np.broadcast_to(menu, cut.shape),) * 4, rest])
    weight = np.stack(
        [
            *_line(spread, start[0], start[1], menu, cut),
            *_line(spread, start[2], start[3], menu, whole - cut),
            rest > 0,
        ]
    )
    smaller = np.concatenate([np.zeros((1, 1)), menu[:, :-1]], axis=1)
    allowed = (menu <= length) | (smaller < length)
    if spread.ring is not None:
        allowed &= spread.stripe % menu == 0
    return Samples(start, np.maximum(size, 1), weight, allowed)


def _line(
    spread: Spread, first: Floats, last: Floats, size: Floats, count: Floats
) -> tuple[Floats, Floats]:
    """Weights of the first and the last of `count` chunks of one size, in place of them all."""
    low = spread.pairs(first + size) - spread.pairs(first)
    high = spread.pairs(last + size) - spread.pairs(last)
    total = spread.pairs(last + size) - spread.pairs(first)
    alike = spread.active(first + size) == spread.active(last + size)
    even = alike & (high > low)
    at_first = np.where(even, (count * high - total) / np.where(even, high - low, 1), 0)
    return at_first, count - at_first


def bounded(sizes: Sizes, samples: Samples, spread: Spread) -> Sizes:
    """The samples' sizes; where stripes go round, with the KV that stands for all chunks (see above)."""
    if spread.ring is None:
        return sizes
    return dataclasses.replace(sizes, KV=sizes.QK / samples.size + (samples.size - 1) / 2)


def prefill_sizes(start: Floats, size: Floats, spread: Spread, riders: Riders) -> Sizes:
    """A chunk of `size` tokens after `start`, with decodes riding, on the busiest group.

    With riders every chunk is counted as wanting logits too, as the prompt's last one does.
    """
    end = start + size
    return Sizes(
        T=size + riders.rows,
        R=np.full_like(size, riders.count + 1 if riders.count else 0),
        QK=spread.pairs(end) - spread.pairs(start),
        KV=spread.held(end),
        KD=np.full_like(size, riders.count * riders.tokens),
        X=size * (spread.computing(end) - 1) + riders.swapped,
    )


def decode_sizes(riders: Riders) -> Sizes:
    """Decodes alone."""
    numbers = (riders.rows, riders.count, 0, 0, riders.count * riders.tokens, riders.swapped)
    return Sizes(*(np.array(float(number)) for number in numbers))


def _triangle(queries: Floats, length: float) -> Floats:
    """Σ min(i, length) over i = 1..queries."""
    inside = np.minimum(queries, length)
    return np.asarray(inside * (inside + 1) / 2 + (queries - inside) * length)
