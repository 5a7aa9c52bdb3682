"""What one `step()` call of a role's program receives: the contract between the runtime and emitted code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segments:
    """Contiguous rows of a micro-batch, each with one request's local KV shard.

    Query i (from 0) of segment s sees the local keys j with `j <= past[s] + i` and `j < kv_len[s]`.
    So a KVP group that stores none of the rows is non-causal (past >= kv_len), one that stores them all
    causal (past = kv_len − rows), and a group whose shard starts after the query sees none (past < 0):
    out = 0, lse = −inf. Several segments may be of one request.

    rows:   int32 [S+1], prefix sums; segment s has the queries rows[s]:rows[s+1] of its kernel's q
    kv_len: int32 [S], tokens of the local shard up to the last query, those appended by this step included
    past:   int32 [S], tokens of the local shard before the first query, less the queries before its first
    pages:  int32 [S, P], page ids of the local shard, in order; unused entries are 0
    max_rows, max_kv: the largest row count and kv_len, as host integers
    """

    rows: torch.Tensor
    kv_len: torch.Tensor
    past: torch.Tensor
    pages: torch.Tensor
    max_rows: int
    max_kv: int

    @property
    def count(self) -> int:
        return int(self.kv_len.shape[0])


@dataclass(frozen=True)
class Exchange:
    """Partial attention results that this rank swaps with one KVP peer.

    peer: global rank
    sent, received: int64 [N], batch rows, in the order of the peer's `received` and `sent`. Where groups
        merge all their heads, both are the rows of requests that both hold; where each merges its share
        (helix), a rank sends the rows that it holds keys for and receives those that the peer does.
    """

    peer: int
    sent: torch.Tensor
    received: torch.Tensor


@dataclass(frozen=True)
class Second:
    """The second half of a micro-batch: its last rows, those of chunks alone.

    rows: how many; prefill: their segments; exchange: as in Batch, of rows counted from the half's first
    """

    rows: int
    prefill: Segments
    exchange: tuple[Exchange, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as one KVP group sees it. Decode rows come first, one row per sequence.

    Where chunks are large and on several groups, rows come in two halves, with one of each such chunk in
    both, so that partial results of one travel while the other is computed: `decode`, `prefill` and
    `exchange` are then the first half's.

    T rows in all, of which `num_decode` are decodes. Tensors lie on the worker's device.

    ids:      int64 [T], token ids
    pos:      int64 [T], positions in their sequences
    slots:    int64 [T], page·page_size + offset where the row's K/V is stored, −1 if not on this group
    last:     int64 [R], rows whose logits are wanted
    decode:   segments of rows 0:num_decode (None if there are none)
    prefill:  segments of rows num_decode:T (None if there are none)
    exchange: partial results to swap over KVP, by ascending peer
    second:   the other half of the rows, or None
    """

    ids: torch.Tensor
    pos: torch.Tensor
    slots: torch.Tensor
    last: torch.Tensor
    num_decode: int
    decode: Segments | None
    prefill: Segments | None
    exchange: tuple[Exchange, ...]
    second: Second | None = None

    @property
    def halves(self) -> tuple[int, int]:
        """Rows of the first half and the second."""
        second = 0 if self.second is None else self.second.rows
        return int(self.pos.shape[0]) - second, second
