"""What a policy says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..job import Job


@dataclass(frozen=True)
class Policy:
    """An order of prompts, and what a long one yields to short ones.

    order: (job, now in seconds) → a number; the lowest goes first, and at a tie whoever came first
    room, least_room: the share of an iteration that a long prompt leaves to short ones behind it, which need
        not use it: its relative slack, but no more and no less than these; room 0: they come in order
    stretch: how many times the TBT promise an iteration may take for a prompt that is late, where decodes are
        ahead of theirs (see `packing`)
    preempts: by how much less, in the order's own unit, a waiting request must have than a running prompt
        to get its pages; None: it waits until they are free
    """

    name: str
    order: Callable[[Job, float], float]
    room: float = 0.0
    least_room: float = 0.0
    stretch: float = 1.0
    preempts: float | None = None
