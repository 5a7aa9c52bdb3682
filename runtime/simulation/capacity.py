"""How much traffic a plan can take: the highest rate at which nearly all requests keep their promises.

Found by bisection over the rate: a trace's requests come closer together or further apart, a workload draws
more or fewer in its time. A trial ends as soon as too many promises are broken, so rates that are far too
high cost little.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType

from ...artifact import Manifest
from ...errors import BadInput
from ..scheduling.limits import Limits
from .engine import Asked, Progress, Simulation, unseen
from .result import Capacity, Result, Trial
from .traffic import MOST_QPS, Traffic, survey

SHARE = 0.99
NEAR = 1.02
"""The search ends when the lowest rate that is too much is so near to the highest that is not."""
LOWEST = 1 / 256
"""Of the first rate: where that is too much still, so is the plan's promise."""


@dataclass(frozen=True)
class Question:
    """What is asked of which plan. skip: leave out requests that can never be served."""

    manifest: Manifest
    cost: ModuleType
    traffic: Traffic
    asked: Asked
    skip: bool = False

    def at(self, qps: float, progress: Progress = unseen) -> Result | None:
        """The simulation at that rate; None if it is too much."""
        traffic = self.traffic.at(qps)
        surveyed = survey(traffic, Limits.of(self.manifest), skip=self.skip)
        most_broken = int(surveyed.requests * (1 - SHARE) + 1e-9)
        asked = dataclasses.replace(self.asked, most_broken=most_broken)
        return Simulation(self.manifest, self.cost, traffic, surveyed, asked).run(progress)


def find_capacity(question: Question, first_qps: float, progress: Progress = unseen) -> Capacity:
    """Double or halve the rate until one is enough and one too much, then halve what lies between.

    BadInput for traffic of which no rate is too much: too few requests to stand in each other's way.
    """
    trials: list[Trial] = []
    best: Result | None = None
    low, high, qps = 0.0, 0.0, first_qps
    while not (low and high and high / low <= NEAR) and qps >= first_qps * LOWEST:
        if qps > MOST_QPS:
            raise BadInput(
                f"its requests keep their promises at {low:.3g} a second too: there is no highest rate",
                where=question.traffic.name,
                do="give more of them",
            )
        result = question.at(qps, _numbered(progress, f"trial {len(trials) + 1}, {qps:.3g}/s"))
        trials.append(Trial(qps, result.everything.kept if result else None))
        if result is None:
            high = qps
        else:
            low, best = qps, result
        qps = (low or high / 4) ** 0.5 * (high or low * 4) ** 0.5
    return Capacity(low, SHARE, tuple(trials), best)


def _numbered(progress: Progress, trial: str) -> Progress:
    """How much longer a trial takes says little of the search, so no time is told."""

    def tell(what: str, fraction: float | None = None, eta_s: float | None = None) -> None:
        progress(f"{trial}, {what}", fraction)

    return tell
