"""Percentiles of any number of values in a fixed amount of memory.

Values are counted in bins whose bounds grow by a constant factor g: bin i holds g^(i−1) < x <= g^i and stands
for 2·g^i/(1 + g), which is off by (g − 1)/(g + 1) of x at most, 1 % here. (As DDSketch does, Masson et al.,
VLDB 2019.) Count, sum, least and greatest are exact.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LEAST, MOST = 1e-7, 1e10
"""Of what is told apart; anything less counts as zero, anything more as the most."""

ERROR = 0.01
_LOG = math.log((1 + ERROR) / (1 - ERROR))
_FIRST = math.ceil(math.log(LEAST) / _LOG)
_BINS = math.ceil(math.log(MOST) / _LOG) - _FIRST + 2  # and one for zero


class Histogram:
    """Counts of values that are not negative."""

    __slots__ = ("_counts", "count", "greatest", "least", "total")

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(_BINS, dtype=np.int64)
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.greatest = 0.0

    def add(self, value: float) -> None:
        assert value >= 0, value
        index = 0
        if value >= LEAST:
            index = min(math.ceil(math.log(value) / _LOG) - _FIRST + 1, _BINS - 1)
        self._counts[index] += 1
        self.count += 1
        self.total += value
        self.least = min(self.least, value)
        self.greatest = max(self.greatest, value)

    def add_all(self, values: NDArray[np.float64]) -> None:
        """Many at once."""
        if not len(values):
            return
        logs = np.log(np.maximum(values, LEAST / 2)) / _LOG
        indices = np.clip(np.ceil(logs).astype(np.int64) - _FIRST + 1, 0, _BINS - 1)
        self._counts += np.bincount(np.where(values < LEAST, 0, indices), minlength=_BINS)
        self.count += len(values)
        self.total += float(values.sum())
        self.least = min(self.least, float(values.min()))
        self.greatest = max(self.greatest, float(values.max()))

    def merge(self, other: Histogram) -> None:
        """Take the other's values too."""
        self._counts += other._counts
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.greatest = max(self.greatest, other.greatest)

    @property
    def mean(self) -> float:
        return self.total / self.count

    def percentile(self, percent: float) -> float:
        """The least of the values that so many per cent do not exceed, to 1 %."""
        assert self.count, "no values"
        rank = max(1, math.ceil(self.count * percent / 100))
        index = int(np.searchsorted(np.cumsum(self._counts), rank))
        if index == 0:
            return self.least
        upper = math.exp((index - 1 + _FIRST) * _LOG)
        return min(max(upper * (1 - ERROR), self.least), self.greatest)
