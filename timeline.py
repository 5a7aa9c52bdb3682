"""What a plan does over one prompt of the promised length, chunk by chunk.

The planner computes it, the report draws it; a leaf, so that both know the type. All times are predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Iteration:
    """One chunk of the prompt, the `number`-th from 1, after `start` cached tokens, on `groups` groups.

    parts_s: seconds of the slowest stage, by part.
    """

    number: int
    start: int
    tokens: int
    groups: int
    parts_s: Mapping[str, float]

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def seconds(self) -> float:
        return sum(self.parts_s.values())


@dataclass(frozen=True)
class Slot:
    """One chunk in one stage, in seconds since the prompt began."""

    stage: int
    number: int
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The prompt's way through the pipeline.

    iterations: first and last chunk of each chunk rule, and the last but one of all (the last may be a rest)
    filling, draining: every stage's slots of the first and of the last few chunks; where the prompt has
    few chunks, filling holds them all and draining is empty
    end_s: when the last chunk has left the last stage
    """

    num_chunks: int
    iterations: tuple[Iteration, ...]
    filling: tuple[Slot, ...]
    draining: tuple[Slot, ...]
    end_s: float
