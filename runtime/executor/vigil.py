"""Which worker has fallen silent: one that is stopped or cut off ends no connection and says nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

SILENCE_S = 5.0
"""A worker that is ready for steps and gives no sign for so long is lost: on a machine where others want
all cores too, a thread may wait for seconds."""
LOADING_SILENCE_S = 30.0
"""While it loads, reading from a slow disk may hold the interpreter for long."""
LOOK_S = 0.5
"""The engine looks at least so often."""


@dataclass(eq=False)
class Vigil:
    """When each worker was last heard, on a clock that stands while the engine does not listen.

    So an engine that was stopped itself, or was busy for long, does not take its workers for silent.
    """

    _listened_s: float = 0.0
    _looked_s: float = field(default_factory=time.monotonic)
    _heard_s: dict[int, float] = field(default_factory=dict)
    _joining: set[int] = field(default_factory=set)
    _join_s: float = 0.0

    def begin(self, ranks: Iterable[int], join_s: float) -> None:
        """Fresh workers. join_s: the time that they have until their first sign"""
        self._heard_s = dict.fromkeys(ranks, self._listened_s)
        self._joining, self._join_s = set(self._heard_s), join_s

    def heard(self, rank: int) -> None:
        self._heard_s[rank] = self._listened_s
        self._joining.discard(rank)

    def silent(self, ready: Iterable[int]) -> tuple[int, float] | None:
        """The rank that was heard least lately, if that is too long ago, and for how many seconds."""
        now_s = time.monotonic()
        self._listened_s += min(now_s - self._looked_s, 2 * LOOK_S)
        self._looked_s = now_s
        for rank, heard_s in self._heard_s.items():
            allowed_s = SILENCE_S if rank in ready else LOADING_SILENCE_S
            if rank in self._joining:
                allowed_s = self._join_s
            if self._listened_s - heard_s > allowed_s:
                return rank, self._listened_s - heard_s
        return None

    def end(self) -> None:
        """Nobody is meant to run."""
        self._heard_s.clear()
