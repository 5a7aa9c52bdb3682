"""Random lengths and times of a workload's classes: distributions, each a few numbers and `draw`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Lengths: TypeAlias = NDArray[np.int64]
Seconds: TypeAlias = NDArray[np.float64]
P90 = 1.2815515655446004
"""The 90th percentile of the normal distribution, in standard deviations."""


class Length(Protocol):
    """Tokens of a prompt or of an answer. most: no draw is longer."""

    @property
    def most(self) -> int: ...

    def draw(self, rng: np.random.Generator, count: int) -> Lengths: ...


@dataclass(frozen=True)
class Lognormal:
    """As lengths of texts are spread: by median and 90th percentile; longer ones are cut to `most`."""

    median: float
    p90: float
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        sigma = math.log(self.p90 / self.median) / P90
        drawn = np.rint(rng.lognormal(math.log(self.median), sigma, count))
        return np.clip(drawn, 1, self.most).astype(np.int64)


@dataclass(frozen=True)
class Constant:
    tokens: int

    @property
    def most(self) -> int:
        return self.tokens

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        return np.full(count, self.tokens)


@dataclass(frozen=True)
class Uniform:
    """Any of low to high, both included."""

    low: int
    high: int

    @property
    def most(self) -> int:
        return self.high

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        return rng.integers(self.low, self.high, count, endpoint=True)


@dataclass(frozen=True)
class Empirical:
    """Any of these, each as often as it stands there."""

    values: tuple[int, ...]

    @property
    def most(self) -> int:
        return max(self.values)

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        return rng.choice(np.array(self.values, dtype=np.int64), count)


@dataclass(frozen=True)
class Arriving:
    """Times between requests. process: one of PROCESSES.

    cv: of "gamma", the deviation over the mean: 1 is poisson, more comes in clumps
    size: of "bursts", how many come at once; bursts come as poisson's requests do
    """

    process: str = "poisson"
    cv: float = 1.0
    size: int = 1

    def draw(self, rng: np.random.Generator, count: int, rate: float) -> Seconds:
        """`count` of them at `rate` requests per second; of bursts, a multiple of their size."""
        if self.process == "poisson":
            return rng.exponential(1 / rate, count)
        if self.process == "gamma":
            shape = 1 / self.cv**2
            return rng.gamma(shape, 1 / (shape * rate), count)
        if self.process == "constant":
            return np.full(count, 1 / rate)
        gaps = np.zeros((-(-count // self.size), self.size))
        gaps[:, 0] = rng.exponential(self.size / rate, len(gaps))
        return gaps.ravel()


PROCESSES = ("poisson", "gamma", "constant", "bursts")
