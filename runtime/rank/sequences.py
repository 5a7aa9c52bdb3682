"""The worker's replicated sequence state: who is here, how long it is, where its pages lie.

The engine says which pages a request gets, and only that; each worker applies every step's deltas and derives
the rest, so page tables and positions never travel, and the work per step does not grow with the context.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..protocol.messages import Admission, Copies, MorePages, Run, Step
from ..request import Logits, Sampling
from ..scheduling.growth import Growth
from .history import History
from .transfer import to_device


@dataclass(eq=False)
class Sequence:
    """A request on this worker.

    shard: which shard of it lies on this group; length: tokens cached after the steps seen so far;
    tokens: int64 [T], its prompt and what was generated before it was preempted;
    pages: int32 [1, P], as wide as its shard may ever need, filled as pages come: what lies behind those
        that hold tokens is never read; page_list: the pages that it has
    """

    id: int
    home: int
    shard: int
    tokens: torch.Tensor
    pages: torch.Tensor
    page_list: list[int]
    sampling: Sampling
    logits: Logits
    history: History
    length: int


@dataclass(frozen=True)
class Part:
    """Rows of one sequence in a step: positions cached .. cached + rows − 1.

    owner: the shard that the last row is stored in; token: the id to decode, −1 for prefill rows.
    end: tokens of the sequence behind the chunk that these rows are of, all of it or a half
    """

    sequence: Sequence
    cached: int
    rows: int
    owner: int
    end: int
    token: int = -1


class Sequences:
    """All requests that this worker knows, and where their pages of its group lie."""

    def __init__(self, growth: Growth, group: int, page_size: int, device: torch.device) -> None:
        self.growth = growth
        self.group = group
        self.page_size = page_size
        self.device = device
        self._all: dict[int, Sequence] = {}

    def apply(self, step: Step) -> tuple[list[Part], list[Part], list[Copies]]:
        """Bring the state up to date; the decodes, prefill chunks and copies that concern this group.

        A request concerns the group once a token of it is, or is being, stored here; under helix, always.
        """
        copies = []
        for change in step.changes:
            if isinstance(change, int):
                del self._all[change]
            elif isinstance(change, Admission):
                self._admit(change)
            elif isinstance(change, MorePages):
                self._grow(change)
            elif change.group == self.group:
                copies.append(change)
        decodes = [self._decode(id, token) for id, token in step.decodes]
        chunks = [self._advance(id, rows, -1) for id, rows in step.chunks]
        return (
            list(filter(self._concerns, decodes)),
            list(filter(self._concerns, chunks)),
            copies,
        )

    def set_length(self, id: int, tokens: int) -> None:
        """As if so many tokens of a request were cached, and no more."""
        self._all[id].length = tokens

    def _concerns(self, part: Part) -> bool:
        return part.sequence.shard < self.growth.seen_by(part.cached + part.rows)

    def _decode(self, id: int, token: int) -> Part:
        self._all[id].history.append(token)
        return self._advance(id, 1, token)

    def _advance(self, id: int, rows: int, token: int) -> Part:
        sequence = self._all[id]
        cached = sequence.length
        sequence.length += rows
        end = sequence.length
        return Part(sequence, cached, rows, self.growth.owner(end - 1), end, token)

    def _admit(self, new: Admission) -> None:
        shard = self.growth.shard(new.home, self.group)
        page_list = _listed(new.pages[self.group])
        width = -(-self.growth.held(shard, new.kv_tokens) // self.page_size)
        pages = torch.zeros(1, width, dtype=torch.int32)
        pages[0, : len(page_list)] = torch.tensor(page_list, dtype=torch.int32)
        tokens = torch.frombuffer(array("i", new.tokens), dtype=torch.int32)
        prompt = len(tokens) - new.generated
        self._all[new.id] = Sequence(
            new.id,
            new.home,
            shard,
            to_device(tokens.long(), self.device),
            to_device(pages, self.device),
            page_list,
            new.sampling,
            new.logits,
            History(tokens[:prompt], tokens[prompt:].tolist(), new.sampling, self.device),
            new.cached,
        )

    def _grow(self, more: MorePages) -> None:
        """In place: micro-batches that are prepared or under way read nothing behind their own tokens."""
        if more.group != self.group:
            return
        sequence, new = self._all[more.id], _listed(more.pages)
        first = len(sequence.page_list)
        sequence.page_list += new
        table = to_device(torch.tensor(new, dtype=torch.int32), self.device)
        sequence.pages[0, first : first + len(new)] = table


def _listed(runs: Iterable[Run]) -> list[int]:
    return [page for start, count in runs for page in range(start, start + count)]
