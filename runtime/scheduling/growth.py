"""KVP growth: which group holds which tokens of a request, and what a chunk costs there.

A request's KV cache is dealt to groups in stripes of `stripe_tokens` tokens: stripe i lies in shard
i mod k, and shard s on group (home + s) mod k. A shard holds its stripes one behind the other. It is
*active* once one of its tokens is cached or being appended: so a request takes on its next group after
each stripe, until all k have joined, and from then on all shards grow in turn. Where a stripe is a k-th
of the request or more, each shard is one run of its tokens.

All queries of a chunk go to every active shard; under helix, to every group: those without an active
shard see no key, but do their share of the FFN. Positions n .. n+c−1 are the chunk's queries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass

from ...artifact import Plan


@dataclass(frozen=True)
class Piece:
    """`rows` queries of a chunk on one shard. Query i of them sees its keys j <= past + i and j < kv_len."""

    rows: int
    past: int
    kv_len: int


@dataclass(frozen=True)
class Growth:
    """kvp: number of groups; stripe_tokens: see above; helix: every group computes every row."""

    kvp: int
    stripe_tokens: int
    helix: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Growth:
        return cls(plan.layout.kvp, plan.stripe_tokens, plan.layout.helix)

    @property
    def round_tokens(self) -> int:
        """Tokens from one stripe of a shard to its next."""
        return self.kvp * self.stripe_tokens

    def owner(self, position: int) -> int:
        """The shard that stores this position."""
        return position // self.stripe_tokens % self.kvp

    def shards(self, tokens: int) -> int:
        """How many shards a sequence of `tokens` tokens has."""
        return min(self.kvp, -(-tokens // self.stripe_tokens))

    def seen_by(self, tokens: int) -> int:
        """On how many groups, from home on, the last rows of a sequence of `tokens` tokens are computed."""
        return self.kvp if self.helix else self.shards(tokens)

    def groups(self, home: int, tokens: int) -> frozenset[int]:
        """Where the last rows of a request of `tokens` tokens are computed."""
        return frozenset(self.group(home, shard) for shard in range(self.seen_by(tokens)))

    def within(self, home: int, groups: Set[int]) -> float:
        """How many tokens a request can have before it needs a group that is none of these."""
        if len(groups) == self.kvp:
            return math.inf
        shards = itertools.count()
        return next(s for s in shards if self.group(home, s) not in groups) * self.stripe_tokens

    def held(self, shard: int, tokens: int) -> int:
        """Tokens of the shard in a sequence of `tokens` tokens: also where its next one goes."""
        rounds, rest = divmod(tokens, self.round_tokens)
        here = rest - shard * self.stripe_tokens
        return rounds * self.stripe_tokens + min(max(0, here), self.stripe_tokens)

    def group(self, home: int, shard: int) -> int:
        """The KVP group that holds the shard of a request at home on `home`."""
        return (home + shard) % self.kvp

    def shard(self, home: int, group: int) -> int:
        """The inverse of `group`: which shard of the request lies on this group."""
        return (group - home) % self.kvp

    def stored(self, shard: int, cached: int, rows: int) -> Iterator[tuple[int, int]]:
        """The chunk's positions that lie in the shard, as runs (first, end)."""
        end = cached + rows
        stripe = cached // self.round_tokens * self.round_tokens + shard * self.stripe_tokens
        for start in range(stripe, end, self.round_tokens):
            first, stop = max(start, cached), min(start + self.stripe_tokens, end)
            if first < stop:
                yield first, stop

    def pieces(self, shard: int, cached: int, rows: int) -> Iterator[Piece]:
        """The chunk as the shard sees it: cut where one more stripe of it begins.

        From there on each query sees one key more, and all see as many once the stripe is full: what a
        piece's two bounds can say. Before a shard's first stripe `past` is negative: these queries see none.
        """
        if self.kvp == 1:
            yield Piece(rows, cached, cached + rows)
            return
        first_stripe, starts = shard * self.stripe_tokens, []
        if rows > 1:  # one cannot be cut, and there may be a thousand of them
            stored = self.stored(shard, cached, rows)
            starts = [start for start, _ in stored if start > first_stripe]
        edges = [cached, *(start for start in starts if start > cached), cached + rows]
        for first, end in itertools.pairwise(edges):
            blind = max(0, first_stripe - first)
            yield Piece(end - first, self.held(shard, first) - blind, self.held(shard, end))

    def read(self, shard: int, cached: int, rows: int) -> int:
        """Keys of the shard that the chunk's pieces read: the sum of their `kv_len`."""
        first_stripe = shard * self.stripe_tokens
        cut = cached + 1 + (first_stripe - cached - 1) % self.round_tokens
        if (cut if cut > first_stripe else cut + self.round_tokens) >= cached + rows:
            return self.held(shard, cached + rows)  # one piece
        return sum(piece.kv_len for piece in self.pieces(shard, cached, rows))

    def pairs(self, shard: int, cached: int, rows: int) -> int:
        """Query–key pairs that `rows` queries after `cached` tokens have on the shard (causal)."""
        if cached // self.stripe_tokens == (cached + rows - 1) // self.stripe_tokens:
            own = rows * (rows + 1) // 2 if self.owner(cached) == shard else 0
            return rows * self.held(shard, cached) + own  # nearly always, and in few steps
        return self._pairs(shard, cached + rows) - self._pairs(shard, cached)

    def _pairs(self, shard: int, queries: int) -> int:
        """Those of the sequence's first queries: each complete round sees a stripe more than the last."""
        stripe = self.stripe_tokens
        rounds, rest = divmod(queries, self.round_tokens)
        later = self.kvp - 1 - shard
        each = _triangle(stripe, stripe) + later * stripe * stripe
        before = rounds * (rounds - 1) // 2 * self.round_tokens + rounds * rest
        return rounds * each + before * stripe + _triangle(rest - shard * stripe, stripe)


def _triangle(queries: int, length: int) -> int:
    """Σ min(i, length) over i = 1..queries: the pairs of the first queries, from the stripe's start."""
    queries = max(0, queries)
    full = min(queries, length)
    return full * (full + 1) // 2 + (queries - full) * length
