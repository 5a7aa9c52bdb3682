"""What the engine counts as it runs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT = 4096
"""Iterations whose times are kept."""


class Iteration(NamedTuple):
    """One micro-batch: its tokens, dispatch to last reply, and what of it the last stage was busy."""

    decodes: int
    prefill_tokens: int
    wall_s: float
    busy_s: float


@dataclass
class Stats:
    """Counters since the start, and the latest iterations.

    prefix_queries: tokens of prompts that were looked for in pages; prefix_hits: that were found there. A
        request counts when it first comes, not when it comes back after a preemption.
    """

    prompt_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    restarts: int = 0
    iterations: deque[Iteration] = field(default_factory=lambda: deque(maxlen=KEPT))

    def clear(self) -> None:
        """Begin again."""
        self.__init__()  # type: ignore[misc]
