"""When those who are sent away may come again: what the forecast says of those who are here.

The forecast takes it that an answer has all tokens that it may; here it has the share of them that answers
have had since the start, and one that has had as many may end at any moment. However many are sent away, the
engine is looked at twice a second at most, and of those between two looks each is told of a later place than
the one before: together they would come for the same.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

from ..engine import Engine
from ..telemetry.snapshot import InFlight, Snapshot
from .following import Following

FRESH_S = 0.5
LEAST_S = 1


class Again:
    """Only in the event loop."""

    def __init__(self, engine: Engine, following: Following) -> None:
        self._engine = engine
        self._following = following
        self._looking = asyncio.Lock()
        self._until_s = 0.0
        self._told = 0
        self._ends_s: list[float] = []
        self._turns_s: list[float] = []

    async def when_one_ends(self) -> int:
        """Seconds until a request that is at work is over. Raises RuntimeFault if the engine has ended."""
        await self._look()
        return self._next(self._ends_s)

    async def when_one_starts(self) -> int:
        """Seconds until an answer that waits has its turn. Raises RuntimeFault if the engine has ended."""
        await self._look()
        return self._next(self._turns_s)

    async def _look(self) -> None:
        async with self._looking:
            if time.monotonic() < self._until_s:
                return
            several = [one.handles for one in self._following.all() if one.handles]
            found = await self._following.look([handle for some in several for handle in some])
            stands = ([found.wanted.get(handle.id) for handle in some] for some in several)
            here = [[one for one in some if one is not None] for some in stands]
            share = self._share()
            ends_s = (max(left_s(one, found, share) for one in some) for some in here if some)
            waiting = (one for some in here for one in some if one.home is None)
            self._ends_s = sorted(ends_s)
            self._turns_s = sorted(waits_s(one) for one in waiting if one.eta_s is not None)
            self._told, self._until_s = 0, time.monotonic() + FRESH_S

    def _next(self, times_s: Sequence[float]) -> int:
        """Of nobody anything is known while bodies are read, and answers that are complete."""
        if not times_s:
            return LEAST_S
        at = min(self._told, len(times_s) - 1)
        self._told += 1
        return max(LEAST_S, math.ceil(times_s[at]))

    def _share(self) -> float:
        """Of the tokens that answers might have had, those that they had."""
        tallies = self._engine.stats.tallies
        most = tallies.request_params_max_tokens.sum
        return tallies.request_generation_tokens.sum / most if most else 1.0


def left_s(one: InFlight, found: Snapshot, share: float) -> float:
    """Until its last token, where answers have this share of the tokens that they may."""
    assert one.left_s is not None and found.token_s is not None, "an engine that serves foretells"
    spared = one.max_tokens - max(one.generated, share * one.max_tokens)
    return one.left_s - spared * found.token_s


def waits_s(one: InFlight) -> float:
    """Until a prompt that waits is begun, at the latest: what its first token takes beyond its own work."""
    assert one.eta_s is not None and one.slack_s is not None, "it has no token yet"
    work_s = one.deadline_s - one.age_s - one.slack_s
    return max(0.0, one.eta_s - work_s)
