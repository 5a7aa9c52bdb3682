"""How much longer than predicted micro-batches take: what one in a hundred takes, over its prediction.

A running quantile by stochastic approximation: each observation above it raises it by UP, each below lowers
it by DOWN, so it rests where UP · P(above) = DOWN · P(below), which is P(above) = 1 %. It forgets, so it
follows a machine that others begin to use, and it costs two comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST, START, MOST = 1.1, 1.4, 4.0
"""Where it is kept: predictions may be off by a tenth even where nothing says so, and if something takes four
times as long, it is not the predictions that are wrong. It starts with care: too low breaks promises, too
high costs a few rows of the first hundreds of chunks."""
UP, DOWN = 0.1, 0.1 / 99


@dataclass
class Overrun:
    """ratio: of a micro-batch's time over its prediction, that one in a hundred exceeds."""

    ratio: float = START

    def saw(self, predicted_s: float, measured_s: float) -> None:
        change = 1 + UP if measured_s > self.ratio * predicted_s else 1 - DOWN
        self.ratio = min(MOST, max(LEAST, self.ratio * change))
