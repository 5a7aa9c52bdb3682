"""Times contenders side by side: warmed up, in turn, over inputs that the cache does not hold; medians.

A contender is one or several calls of the same work on different data. They are called one after the other
as one thing, so that data is long gone from the cache when its turn comes again; its time is that of all
calls, divided by their number. Contenders take turns within each round, so that a clock that falls hits all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .device import Device, Ready, Run

LEAST_ROUNDS = 3
MOST_ROUNDS = 60
COLD = 3
"""Calls on different data cover this many times the cache between two uses of the same."""
MOST_CALLS = 32


@dataclass(frozen=True)
class Timing:
    """Of one call. least_s, most_s: the quickest and the slowest round; how: see `device.Ready`."""

    median_s: float
    least_s: float
    most_s: float
    rounds: int
    how: str


def copies(call_bytes: float, cache_bytes: int) -> int:
    """How many inputs of so many bytes to rotate through."""
    return max(1, min(MOST_CALLS, math.ceil(COLD * cache_bytes / max(1.0, call_bytes))))


def race(
    device: Device,
    contenders: Mapping[str, Sequence[Run]],
    least_s: float,
    *,
    capture: bool = True,
) -> dict[str, Timing]:
    """Median time of one call of each, over rounds that take at least `least_s` for each contender."""
    ready = {name: _ready(device, calls, capture) for name, calls in contenders.items()}
    runs = [entry.run for entry in ready.values()]
    first = device.seconds(runs)
    rounds = math.ceil(least_s / max(1e-7, statistics.median(first)))
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds))
    times = [device.seconds(runs) for _ in range(rounds)]
    found = {}
    for i, (name, entry) in enumerate(ready.items()):
        count = len(contenders[name])
        own = [seconds[i] / count for seconds in times]
        found[name] = Timing(statistics.median(own), min(own), max(own), rounds, entry.how)
    return found


def _ready(device: Device, calls: Sequence[Run], capture: bool) -> Ready:
    def every() -> None:
        for call in calls:
            call()

    return device.ready(every, capture=capture)
