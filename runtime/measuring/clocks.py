"""Times work as the device does it, without Python in between: captured in CUDA graphs, and replayed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..rank.graphs import captured, warmed
from .attending import Run

Clock = Callable[[Sequence[Run]], float]
"""Calls of the same work on different data → seconds of one."""

Race = Callable[[Mapping[str, Sequence[Run]]], Mapping[str, float]]
"""The same of several contenders, by name, which take turns."""

_ROUNDS = 25


def graph_race(contenders: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Median seconds of one call of each contender."""
    replays = {}
    for name, calls in contenders.items():

        def every(calls: Sequence[Run] = calls) -> None:
            for call in calls:
                call()

        warmed(every)
        replays[name], _ = captured(every)
        replays[name]()
    event: Any = torch.cuda.Event  # untyped, as torch has it
    marks = [event(enable_timing=True) for _ in range(_ROUNDS * len(replays) + 1)]
    marks[0].record()
    for mark, replay in zip(marks[1:], itertools.cycle(replays.values()), strict=False):
        replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    return {
        name: statistics.median(times[i :: len(replays)]) / len(contenders[name])
        for i, name in enumerate(replays)
    }


def graph_clock(calls: Sequence[Run]) -> float:
    """Median seconds of one of the calls."""
    return graph_race({"": calls})[""]
