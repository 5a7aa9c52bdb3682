"""KVP growth: which group holds which tokens of a request, and what a chunk costs there.

A request's KV cache is cut along the sequence into shards of `group_tokens` tokens. Shard i lies on
group (home + i) mod k; the last shard (i = k − 1) takes whatever is left. A shard is *active* once
one of its tokens is cached or being appended. All queries of a chunk go to every active shard; under
helix, to every group: those without an active shard see no key, but do their share of the FFN.

Positions n .. n+c−1 are the chunk's queries; a shard holds the positions start .. end−1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..artifact import Plan


@dataclass(frozen=True)
class Growth:
    """kvp: number of groups; group_tokens: tokens of a shard; helix: every group computes every row."""

    kvp: int
    group_tokens: int
    helix: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Growth:
        return cls(plan.layout.kvp, plan.group_tokens, plan.layout.helix)

    def owner(self, position: int) -> int:
        """The shard that stores this position."""
        return min(position // self.group_tokens, self.kvp - 1)

    def shards(self, tokens: int) -> int:
        """How many shards a sequence of `tokens` tokens has."""
        return self.owner(tokens - 1) + 1

    def seen_by(self, tokens: int) -> int:
        """On how many groups, from home on, the last rows of a sequence of `tokens` tokens are computed."""
        return self.kvp if self.helix else self.shards(tokens)

    def start(self, shard: int) -> int:
        """The first position of a shard."""
        return shard * self.group_tokens

    def held(self, shard: int, tokens: int) -> int:
        """Tokens of the shard in a sequence of `tokens` tokens."""
        after = max(0, tokens - self.start(shard))
        return after if shard == self.kvp - 1 else min(after, self.group_tokens)

    def group(self, home: int, shard: int) -> int:
        """The KVP group that holds the shard of a request at home on `home`."""
        return (home + shard) % self.kvp

    def shard(self, home: int, group: int) -> int:
        """The inverse of `group`: which shard of the request lies on this group."""
        return (group - home) % self.kvp

    def pairs(self, shard: int, cached: int, rows: int) -> int:
        """Query–key pairs that `rows` queries after `cached` tokens have on the shard (causal)."""
        length = self.held(shard, cached + rows)
        last, first = cached + rows - self.start(shard), cached - self.start(shard)
        return _triangle(last, length) - _triangle(first, length)


def _triangle(queries: int, length: int) -> int:
    """Σ min(i, length) over i = 1..queries: the pairs of the first queries, from the shard's start."""
    queries = max(0, queries)
    full = min(queries, length)
    return full * (full + 1) // 2 + (queries - full) * length
