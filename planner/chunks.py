"""Context buckets, the menu of chunk sizes, and what one chunk asks of the busiest KVP group.

Legend: n tokens cached before the chunk, c its tokens, M tokens per KVP group, B buckets, C menu.

**Buckets** cut the context [0, N) at multiples of one unit u, growing geometrically: later buckets
are about a fifth of what lies before them. u = 16·{120, 360, 840} has many divisors, and the menu is
those divisors that are multiples of 16, so chunks of any planned size tile their bucket and each
bucket's first chunk starts where the bucket does, without the scheduler having to cut any short.

**The busiest group** is the request's home group 0: for each query it holds at least as many visible
keys as any later group. A query at position q sees min(q + 1, M) keys there, so a chunk has

    QK = S(n + c) − S(n),   S(x) = Σ_{q<x} min(q + 1, M) = u(u + 1)/2 + (x − u)·M,  u = min(x, M)
    KV = min(n + c, M)
    G  = (n + c − 1) ÷ M + 1        active groups
    X  = c·(G − 1)                  partial rows swapped with peers

Under helix all k groups compute every row, G = k, and the decodes that ride are those of all requests: for
those that hold no tokens on the busiest group, rows without keys (`Riders.blind`).

**The sum over a bucket** uses few samples: its first, middle and last whole chunk and the rest chunk;
"middle" is the last chunk before one more group joins, where one does.
An iteration's time is convex in n while G stays the same (a maximum of affine functions), so the
trapezoid rule bounds the sum from above (and is exact where it is affine); where G changes between
two samples, or the first of them is the one that fills the home group, the later, dearer one stands for
all chunks between them.
"""

from __future__ import annotations

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
    """Per sample, bucket and menu entry [4, B, C]: chunk start, size and weight in the bucket's sum.

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
    """How a request lies on KVP groups: tokens on each, and how many groups compute its rows.

    groups: all of them (helix), or None: those that hold any of its tokens
    """

    tokens: int
    groups: int | None = None

    def computing(self, end: Floats) -> Floats:
        """Groups that compute the last of a request's first `end` tokens."""
        if self.groups is None:
            return active_groups(end, self.tokens)
        return np.full_like(end, self.groups)


def make_grid(context: int) -> Grid:
    """Buckets and menu for prompts of up to `context` tokens."""
    unit = next((u for u in _UNITS if 8 * u >= context), _UNITS[-1])
    cuts, step = [0], 1
    while cuts[-1] < context:
        cuts.append(cuts[-1] + step * unit)
        done = cuts[-1] // unit
        step = max(1, 1 << max(0, done.bit_length() - 3))
    cuts[-1] = context
    menu = tuple(c for c in range(GRAIN, unit + 1, GRAIN) if unit % c == 0)
    return Grid(tuple(cuts[:-1]), tuple(cuts[1:]), menu)


def active_groups(end: Floats, group_tokens: int) -> Floats:
    """Groups that hold any of the first `end` tokens of a request."""
    return np.floor((end - 1) / group_tokens) + 1


def sample(grid: Grid, group_tokens: int) -> Samples:
    """The samples and weights that stand for all chunks of each (bucket, chunk size)."""
    starts, ends = (np.array(side, dtype=float)[:, None] for side in (grid.starts, grid.ends))
    menu = np.array(grid.menu, dtype=float)[None, :]
    length = ends - starts
    whole = np.floor(length / menu)
    rest = length - whole * menu
    last = np.maximum(whole - 1, 0)
    until_more_groups = (np.floor(starts / group_tokens) + 1) * group_tokens - starts
    before = np.floor(until_more_groups / menu) - 1
    middle = np.where((before >= 0) & (before < last), before, np.floor(last / 2))
    index = np.stack([np.zeros_like(last), middle, last])
    start = np.concatenate([starts + index * menu, (starts + whole * menu)[None]])
    size = np.concatenate([np.broadcast_to(menu, index.shape), rest[None]])
    groups, full = active_groups(start + size, group_tokens), start >= group_tokens
    weight = np.zeros_like(start)
    weight[0] = whole > 0
    for i in (0, 1):
        count = index[i + 1] - index[i]
        same = (groups[i] == groups[i + 1]) & (full[i] == full[i + 1])
        weight[i] += np.where(same & (count > 0), (count - 1) / 2, 0)
        weight[i + 1] += np.where(same & (count > 0), (count + 1) / 2, count)
    weight[3] = rest > 0
    smaller = np.concatenate([np.zeros((1, 1)), menu[:, :-1]], axis=1)
    allowed = (menu <= length) | (smaller < length)
    return Samples(start, np.maximum(size, 1), weight, allowed)


def prefill_sizes(start: Floats, size: Floats, spread: Spread, riders: Riders) -> Sizes:
    """A chunk of `size` tokens after `start`, with decodes riding, on the busiest group.

    With riders every chunk is counted as wanting logits too, as the prompt's last one does.
    """
    end = start + size
    return Sizes(
        T=size + riders.rows,
        R=np.full_like(size, riders.count + 1 if riders.count else 0),
        QK=_pairs(end, spread.tokens) - _pairs(start, spread.tokens),
        KV=np.minimum(end, spread.tokens),
        KD=np.full_like(size, riders.count * riders.tokens),
        X=size * (spread.computing(end) - 1) + riders.swapped,
    )


def decode_sizes(riders: Riders) -> Sizes:
    """Decodes alone."""
    numbers = (riders.rows, riders.count, 0, 0, riders.count * riders.tokens, riders.swapped)
    return Sizes(*(np.array(float(number)) for number in numbers))


def _pairs(end: Floats, group_tokens: int) -> Floats:
    inside = np.minimum(end, group_tokens)
    return np.asarray(inside * (inside + 1) / 2 + (end - inside) * group_tokens)
