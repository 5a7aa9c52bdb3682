"""The worker's replicated sequence state: who is here, how long it is, where its pages lie.

Each worker applies every step's deltas and derives the rest, so page tables and positions never
travel, and the work per step does not grow with the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .growth import Growth
from .pages import PagePool
from .protocol import Admission, Step
from .request import Logits, Sampling
from .transfer import to_device


@dataclass(eq=False)
class Sequence:
    """A request on this worker.

    shard: which shard of it lies on this group; length: tokens cached after the steps seen so far;
    prompt: int64 [prompt tokens]; pages: int32 [1, P], all pages reserved for the shard;
    page_list: the same as integers.
    """

    id: int
    home: int
    shard: int
    prompt: torch.Tensor
    pages: torch.Tensor
    page_list: list[int]
    sampling: Sampling
    logits: Logits
    length: int = 0


@dataclass(frozen=True)
class Part:
    """Rows of one sequence in a step: positions cached .. cached + rows − 1.

    owner: the shard that the last row is stored in; token: the id to decode, −1 for prefill rows.
    """

    sequence: Sequence
    cached: int
    rows: int
    owner: int
    token: int = -1


class Sequences:
    """All requests that this worker knows, and the pages of its group."""

    def __init__(
        self, growth: Growth, group: int, num_pages: int, page_size: int, device: torch.device
    ) -> None:
        self.growth = growth
        self.group = group
        self.page_size = page_size
        self.device = device
        self._pool = PagePool(num_pages)
        self._all: dict[int, Sequence] = {}

    def apply(self, step: Step) -> tuple[list[Part], list[Part]]:
        """Bring the state up to date; the decodes and the prefill chunks that concern this group.

        A request concerns the group once a token of it is, or is being, stored here; under helix, always.
        """
        for change in step.changes:
            if isinstance(change, int):
                self._drop(change)
            else:
                self._admit(change)
        decodes = [self._advance(id, 1, token) for id, token in step.decodes]
        chunks = [self._advance(id, rows, -1) for id, rows in step.chunks]
        return list(filter(self._concerns, decodes)), list(filter(self._concerns, chunks))

    def set_length(self, id: int, tokens: int) -> None:
        """As if so many tokens of a request were cached, and no more."""
        self._all[id].length = tokens

    def _concerns(self, part: Part) -> bool:
        return part.sequence.shard < self.growth.seen_by(part.cached + part.rows)

    def _advance(self, id: int, rows: int, token: int) -> Part:
        sequence = self._all[id]
        cached = sequence.length
        sequence.length += rows
        return Part(sequence, cached, rows, self.growth.owner(sequence.length - 1), token)

    def _admit(self, new: Admission) -> None:
        shard = self.growth.shard(new.home, self.group)
        held = self.growth.held(shard, new.kv_tokens)
        page_list: list[int] = []
        if held:
            for start, count in self._pool.reserve(new.id, -(-held // self.page_size)):
                page_list.extend(range(start, start + count))
        prompt = torch.frombuffer(new.prompt, dtype=torch.int32)
        self._all[new.id] = Sequence(
            new.id,
            new.home,
            shard,
            to_device(prompt.long(), self.device),
            to_device(torch.tensor([page_list], dtype=torch.int32), self.device),
            page_list,
            new.sampling,
            new.logits,
        )

    def _drop(self, id: int) -> None:
        if self._all.pop(id).page_list:
            self._pool.release(id)
