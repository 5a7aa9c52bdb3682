"""Makes the `Batch` of one KVP group from its parts of a step. Decode rows first, then prefill rows.

Parts keep the step's order, so that KVP peers agree on the order of the rows that they swap. A
chunk may cross from one stripe into the next: every active group (under helix, every group) gets all of
its rows as queries, stores those that lie in its own shard (slot −1 otherwise), and is told what each
query sees. All of a chunk's keys are stored before attention runs, so where a further stripe of the shard
begins within the chunk, a segment of its own begins too: its queries see keys that earlier ones must not.

Where the plan has chunks' partial results travel while others are computed, a chunk is cut into two halves of
its rows, and all second halves come last.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from ...microbatch import Batch, Exchange, Second, Segments
from ..scheduling.growth import Growth
from .sequences import Part, Sequence
from .transfer import to_device

MAX_CACHED_TABLES = 8


@dataclass(frozen=True)
class Wanted:
    """What becomes of `count` logits rows from `first` on.

    position: in its sequence, of the first of them;
    sample: the last of them yields a token; send: how many of them, from the first, go to the client.
    """

    sequence: Sequence
    position: int
    first: int
    count: int
    sample: bool
    send: int


class _Table:
    """The page tables of several sequences, one below the other.

    pages: int32 [S, P]; known: how many pages of each sequence are in it
    """

    def __init__(self, sequences: Seq[Sequence], device: torch.device) -> None:
        width = max(sequence.pages.shape[1] for sequence in sequences)
        self.pages = torch.zeros(len(sequences), width, dtype=torch.int32, device=device)
        for row, sequence in enumerate(sequences):
            self.pages[row, : sequence.pages.shape[1]] = sequence.pages[0]
        self.known = [len(sequence.page_list) for sequence in sequences]

    def catch_up(self, sequences: Seq[Sequence]) -> None:
        """Take over, in place and all at once, the pages that sequences have got meanwhile."""
        counts = [len(sequence.page_list) for sequence in sequences]
        if counts == self.known:
            return
        new = [
            (row, column, sequences[row].page_list[column])
            for row, (known, count) in enumerate(zip(self.known, counts, strict=True))
            for column in range(known, count)
        ]
        rows, columns, pages = to_device(torch.tensor(new).T.contiguous(), self.pages.device)
        self.pages[rows, columns] = pages.int()
        self.known = counts


class Batches:
    """Builds batches for one group on one device, with the tensors that can be kept kept.

    peers: by KVP group, the global rank of the worker of the same stage and tensor slice.
    overlap_rows: as in `artifact.Plan`
    """

    def __init__(
        self,
        growth: Growth,
        page_size: int,
        peers: Seq[int],
        device: torch.device,
        overlap_rows: int = 0,
    ) -> None:
        self.growth = growth
        self.overlap_rows = overlap_rows
        self.page_size = page_size
        self.peers = peers
        self.device = device
        self._tables: dict[tuple[int, ...], _Table] = {}
        self._arange = torch.arange(257, dtype=torch.int32, device=device)

    def build(self, decodes: Seq[Part], chunks: Seq[Part]) -> tuple[Batch, list[Wanted]]:
        ints = [
            [part.token for part in decodes],
            [part.cached for part in decodes],
            [self._slot(part) for part in decodes],
        ]
        rows = to_device(torch.tensor(ints, dtype=torch.int64), self.device)
        first, second = self._halved(chunks)
        chunks = [*first, *second]
        if chunks:
            rows = torch.cat([rows, *(self._chunk_rows(part) for part in chunks)], dim=1)
        last, wanted = self._wanted([*decodes, *chunks])
        batch = Batch(
            ids=rows[0],
            pos=rows[1],
            slots=rows[2],
            last=to_device(torch.tensor(last, dtype=torch.int64), self.device),
            num_decode=len(decodes),
            decode=self._segments(decodes) if decodes else None,
            prefill=self._segments(first) if first else None,
            exchange=self._exchange([*decodes, *first]) if self.growth.kvp > 1 else (),
            second=self._second(second) if second else None,
        )
        return batch, wanted

    def _halved(self, chunks: Seq[Part]) -> tuple[list[Part], list[Part]]:
        """Chunks that are worth it, in two. All groups that compute a chunk cut it alike."""
        first: list[Part] = []
        second: list[Part] = []
        for part in chunks:
            several = self.growth.seen_by(part.end) > 1
            if several and 0 < self.overlap_rows <= part.rows:
                rows = part.rows - part.rows // 2
                first.append(dataclasses.replace(part, rows=rows))
                rest = part.rows - rows
                second.append(dataclasses.replace(part, cached=part.cached + rows, rows=rest))
            else:
                first.append(part)
        return first, second

    def _second(self, parts: Seq[Part]) -> Second:
        rows = sum(part.rows for part in parts)
        return Second(rows, self._segments(parts), self._exchange(parts))

    def _slot(self, part: Part) -> int:
        """Where a decode's K/V is stored; −1 if on another group."""
        if part.sequence.shard != part.owner:
            return -1
        local = self.growth.held(part.owner, part.cached)
        return part.sequence.page_list[local // self.page_size] * self.page_size + (
            local % self.page_size
        )

    def _chunk_rows(self, part: Part) -> torch.Tensor:
        """ids, pos and slots of a chunk, int64 [3, rows]."""
        n, end, shard = part.cached, part.cached + part.rows, part.sequence.shard
        rows = torch.empty(3, part.rows, dtype=torch.int64, device=self.device)
        rows[0] = part.sequence.tokens[n:end]
        torch.arange(n, end, out=rows[1])
        rows[2] = -1
        for first, stop in self.growth.stored(shard, n, part.rows):
            held = self.growth.held(shard, first)
            local = torch.arange(held, held + stop - first, device=self.device)
            pages = part.sequence.pages[0, local // self.page_size]
            rows[2, first - n : stop - n] = pages * self.page_size + local % self.page_size
        return rows

    def _wanted(self, parts: Seq[Part]) -> tuple[list[int], list[Wanted]]:
        """The rows whose logits are wanted on this group, and by whom."""
        last: list[int] = []
        wanted = []
        row = 0
        for part in parts:
            if part.sequence.shard == part.owner:
                rows, sample, send = _wanted_rows(part)
                if rows:
                    position = part.cached + rows[0]
                    found = Wanted(part.sequence, position, len(last), len(rows), sample, send)
                    wanted.append(found)
                    last.extend(row + i for i in rows)
            row += part.rows
        return last, wanted

    def _segments(self, parts: Seq[Part]) -> Segments:
        cut = [
            (part.sequence, piece)
            for part in parts
            for piece in self.growth.pieces(part.sequence.shard, part.cached, part.rows)
        ]
        kv_len = [piece.kv_len for _, piece in cut]
        past = [piece.past for _, piece in cut]
        ints = to_device(torch.tensor([kv_len, past], dtype=torch.int32), self.device)
        rows = [piece.rows for _, piece in cut]
        return Segments(
            rows=self._offsets(rows),
            kv_len=ints[0],
            past=ints[1],
            pages=self._table([sequence for sequence, _ in cut]),
            max_rows=max(rows),
            max_kv=max(kv_len),
        )

    def _offsets(self, rows: Seq[int]) -> torch.Tensor:
        if max(rows) == 1 and len(rows) < self._arange.shape[0]:
            return self._arange[: len(rows) + 1]
        offsets = list(itertools.accumulate(rows, initial=0))
        return to_device(torch.tensor(offsets, dtype=torch.int32), self.device)

    def _table(self, sequences: Seq[Sequence]) -> torch.Tensor:
        """Page table int32 [S, P]: the same tensor as long as the same sequences are together."""
        if len(sequences) == 1:
            return sequences[0].pages
        key = tuple(sequence.id for sequence in sequences)
        if key not in self._tables:
            if len(self._tables) >= MAX_CACHED_TABLES:
                self._tables.clear()
            self._tables[key] = _Table(sequences, self.device)
        table = self._tables[key]
        table.catch_up(sequences)
        return table.pages

    def _exchange(self, parts: Seq[Part]) -> tuple[Exchange, ...]:
        """A request's active groups send its rows to all others that compute them."""
        swaps: dict[int, tuple[list[int], list[int]]] = {}
        row = 0
        for part in parts:
            rows = range(row, row + part.rows)
            mine, active = part.sequence.shard, self.growth.shards(part.end)
            for shard in range(self.growth.seen_by(part.end)):
                if shard == mine:
                    continue
                peer = self.peers[self.growth.group(part.sequence.home, shard)]
                sent, received = swaps.setdefault(peer, ([], []))
                if mine < active:
                    sent.extend(rows)
                if shard < active:
                    received.extend(rows)
            row += part.rows
        return tuple(
            self._exchange_with(peer, sent, received)
            for peer, (sent, received) in sorted(swaps.items())
        )

    def _exchange_with(self, peer: int, sent: list[int], received: list[int]) -> Exchange:
        """One tensor serves both ways where both are the same, as they always are without helix."""
        lists = (sent,) if sent == received else (sent, received)
        rows = [to_device(torch.tensor(rows, dtype=torch.int64), self.device) for rows in lists]
        return Exchange(peer, rows[0], rows[-1])


def _wanted_rows(part: Part) -> tuple[list[int], bool, int]:
    """Rows (from 0) of the part whose logits are wanted, whether to sample, how many to send."""
    asked = part.sequence.logits
    if part.token >= 0:
        return [0], True, int(asked != "none")
    end = part.cached + part.rows
    ends = end == part.sequence.tokens.shape[0]
    rows: list[int] = []
    if asked == "all":
        rows = list(range(part.rows))
    elif isinstance(asked, tuple):
        rows = sorted(
            {position - part.cached for position in asked if part.cached <= position < end}
        )
    if ends and (not rows or rows[-1] != part.rows - 1):
        rows.append(part.rows - 1)
    send = 0 if asked == "none" else len(rows)
    return rows, ends, send
