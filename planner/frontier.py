"""The frontier of GPUs × TTFT × TBT, by solving the question again and again.

For a TBT promise, the first point is the fewest GPUs that keep it at all, with their least TTFT; each
next is the fewest GPUs whose TTFT is less by a step. Whatever is at least as good as a point of some TBT
promise in GPUs and TBT keeps that promise too, so it is no faster: no plan dominates a point.

TBT promises are the question's own and the 1–2–5 series about it, from the least that any layout keeps to
the first that gains nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..alternatives import Frontier, Point
from .what_if import WhatIf

STEP = 0.01
_DECADES = 1.0


def frontier(question: WhatIf) -> Frontier:
    """The frontier within the devices that the question may use; without points if memory is too small."""
    asked = question.promise.tbt_s
    levels: list[float] = []
    points: dict[tuple[int, float, float], Point] = {}
    for tbt_s in _series(question):
        found = {(p.gpus, p.ttft_s, p.tbt_s): p for p in _sweep(question, tbt_s)}
        gained = not found.keys() <= points.keys()
        if gained or tbt_s == asked:
            levels.append(tbt_s)
        points |= found
        if not gained and points and tbt_s > asked:
            break
    kept = (p for p in points.values() if not any(_dominates(o, p) for o in points.values()))
    order = sorted(kept, key=lambda p: (p.gpus, p.ttft_s, p.tbt_s))
    return Frontier(tuple(levels), STEP, tuple(order))


def _sweep(question: WhatIf, tbt_s: float) -> Iterator[Point]:
    """The least TTFT of ever more GPUs, with one TBT promise."""
    ttft_s = math.inf
    while True:
        answer = question.solve(ttft_s=ttft_s, tbt_s=tbt_s, objective="gpus")
        if answer is None:
            return
        yield answer.point
        ttft_s = answer.ttft_s * (1 - STEP)


def _series(question: WhatIf) -> list[float]:
    """TBT promises to ask, ascending: 1–2–5 within some decades of the question's own, and that one."""
    asked = question.promise.tbt_s
    low, high = asked * 10**-_DECADES, asked * 10**_DECADES
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_s = (float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5))
    return sorted({asked, *(s for s in round_s if low < s < high)})


def _dominates(one: Point, other: Point) -> bool:
    """As good in all three, and another."""
    figures = [(p.gpus, p.ttft_s, p.tbt_s) for p in (one, other)]
    return figures[0] != figures[1] and all(a <= b for a, b in zip(*figures, strict=True))
