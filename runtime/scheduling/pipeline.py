"""When micro-batches will be through, as predicted: what is on its way before one is waited for.

    through = max(sent + crossing, through of the one before it + pace)

On each KVP group micro-batches pass the stages in the order in which they were sent. Where one is through
later or earlier than was predicted, so are those behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from .cost import Cost, Load


class Expected(NamedTuple):
    """Of a micro-batch, predicted when it was sent. crossing_s: from then to the end of the last stage, had
    it the pipeline to itself; pace_s: behind another, in a full one; through_s: when it will be through.
    """

    sent_s: float = 0.0
    crossing_s: float = 0.0
    pace_s: float = 0.0
    through_s: float = 0.0


def pace_s(cost: Cost, loads: Mapping[int, Load]) -> float:
    """Until the next micro-batch can follow."""
    return max(map(cost.pace_s, loads.values()))


class Pipeline:
    """What is expected of each KVP group."""

    def __init__(self, cost: Cost, kvp: int) -> None:
        self._cost = cost
        self._through_s = [-math.inf] * kvp

    def send(self, loads: Mapping[int, Load], now_s: float) -> Expected:
        """A micro-batch sets out; its groups are through together."""
        crossing_s = max(map(self._cost.crossing_s, loads.values()))
        paced_s = pace_s(self._cost, loads)
        before_s = max([self._through_s[group] for group in loads])
        through_s = max(now_s + crossing_s, before_s + paced_s)
        for group in loads:
            self._through_s[group] = through_s
        return Expected(now_s, crossing_s, paced_s, through_s)

    def landed(self, loads: Mapping[int, Load], expected: Expected, now_s: float) -> None:
        """It is through."""
        late_s = now_s - expected.through_s
        for group in loads:
            self._through_s[group] += late_s

    def clear(self) -> None:
        """Nothing is on its way any more."""
        self._through_s = [-math.inf] * len(self._through_s)
