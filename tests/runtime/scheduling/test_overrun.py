"""What one micro-batch in a hundred takes beyond its prediction, learnt as they come."""

from __future__ import annotations

import random

import pytest
from mnemoc.runtime.scheduling.overrun import LEAST, MOST, Overrun


@pytest.mark.parametrize("spread", [0.1, 0.3])
def test_it_rests_where_one_in_a_hundred_is_above(spread: float) -> None:
    draw, overrun, above = random.Random(1), Overrun(), 0
    for i in range(40_000):
        ratio = draw.lognormvariate(0.1, spread)
        above += i >= 20_000 and ratio > overrun.ratio
        overrun.saw(1e-3, ratio * 1e-3)
    assert 0.007 < above / 20_000 < 0.013


def test_it_forgets_and_stays_within_reason() -> None:
    overrun = Overrun()
    for _ in range(200):
        overrun.saw(1.0, 100.0)
    assert overrun.ratio == MOST
    for _ in range(6000):
        overrun.saw(1.0, 1.0)
    assert overrun.ratio == LEAST
