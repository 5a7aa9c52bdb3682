"""What a sequence's tokens say about its next one: where it stands, and what penalties count."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..request import Sampling
from .transfer import to_device


class History:
    """The tokens of a sequence, counted as they come: work per token does not grow with them.

    length: of prompt and answer; generated: tokens of the answer; counts: how often each id is in it
    prompt_ids: int64 [U], distinct ids of the prompt, where a penalty asks for them
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        generated: Iterable[int],
        sampling: Sampling,
        device: torch.device,
    ) -> None:
        """prompt: token ids, on the host."""
        self.length = prompt.shape[0]
        self.generated = 0
        self.counts: dict[int, int] = {}
        self.prompt_ids: torch.Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.prompt_ids = to_device(_distinct(prompt), device)
        for token in generated:
            self.append(token)

    def append(self, token: int) -> None:
        """A token was generated."""
        self.length += 1
        self.generated += 1
        self.counts[token] = self.counts.get(token, 0) + 1


def _distinct(ids: torch.Tensor) -> torch.Tensor:
    """In time linear in the ids: a prompt may have millions."""
    there = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
    there[ids.long()] = True
    return there.nonzero().flatten()
