"""When prompts will have their first token, given all that runs and waits: pure policy, no clock of its own.

Running the scheduler ahead on a copy of its state would be exact, but the copy alone (pages, hashes) takes
longer than a step, and a long prompt needs thousands of steps. A closed form, work ahead over the share of
time that prompts have, is quick and wrong where order changes: under LARS a long prompt is overtaken now and
overtakes later. So the schedule is run ahead as a fluid (`fluid`), in some hundreds of microseconds.

What is on its way goes before everything: of each group, what its micro-batches are predicted to take yet.
All of it is corrected by `drift`, how long micro-batches took of late over their prediction, and slowed by
`coming`: what short prompts, who overtake a long one, brought of work per second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...errors import BadInput, MnemocError
from ...units import format_duration
from ..request import Promise, TooLate
from .cost import Cost
from .fluid import Fluid
from .job import Job
from .packing import Adaptive
from .pipeline import Expected
from .scheduler import Scheduler

REMEMBERED_S = 60.0
"""How long those who came are remembered."""
LEARNT_S, PRIOR_S = 5.0, 0.1
"""Seconds of work over which it is learnt what micro-batches take over their prediction, and those for which
the prediction itself stands."""
MOST_AT_ONCE = 8.0
"""Times what was expected of a micro-batch, that one can teach: what takes longer was held up by something
else."""


@dataclass
class Drift:
    """How long micro-batches take over their prediction, over the last seconds of work."""

    predicted_s: float = PRIOR_S
    measured_s: float = PRIOR_S

    @property
    def ratio(self) -> float:
        return self.measured_s / self.predicted_s

    def saw(self, predicted_s: float, measured_s: float) -> None:
        measured_s = min(measured_s, MOST_AT_ONCE * self.ratio * predicted_s)
        kept = LEARNT_S / (LEARNT_S + measured_s)
        self.predicted_s = kept * self.predicted_s + predicted_s
        self.measured_s = kept * self.measured_s + measured_s


@dataclass
class Coming:
    """Short prompts' predicted work per second, of those who came in the last minute or so."""

    per_s: float = 0.0
    _seen_s: float = -math.inf

    def saw(self, job: Job, now_s: float) -> None:
        if not job.long:
            self.per_s = self.rate(now_s) + job.work_s / REMEMBERED_S
            self._seen_s = now_s

    def rate(self, now_s: float) -> float:
        return self.per_s * math.exp((self._seen_s - now_s) / REMEMBERED_S)


@dataclass(frozen=True)
class Outlook:
    """first_s: predicted seconds from now to the first token, by request; token_s: from one token of a decode
    to its next."""

    first_s: Mapping[int, float]
    token_s: float


@dataclass(frozen=True)
class UnderWay:
    """A micro-batch that was sent. groups: that are not through."""

    groups: Iterable[int]
    expected: Expected


@dataclass(eq=False)
class Forecast:
    """Of one scheduler. drift, coming: what it has learnt; landed_s: when each group's last micro-batch was
    through."""

    scheduler: Scheduler
    cost: Cost
    drift: Drift = field(default_factory=Drift)
    coming: Coming = field(default_factory=Coming)
    landed_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.scheduler
        self._packing = Adaptive(
            known.plan,
            self.cost,
            known.growth,
            known.policy,
            known.workload.tbt_s,
            known.running,
            known.overrun,
        )

    def look(
        self, now_s: float, under_way: Iterable[UnderWay], until: Job | None = None
    ) -> Outlook:
        """Of all that have no token yet; until: whoever comes later than this one is left out."""
        fluid = Fluid(
            self.scheduler,
            self._packing,
            self.coming.rate(now_s),
            now_s,
            self._backlog_s(now_s, under_way),
        )
        drift = self.drift.ratio
        first_s = {id: drift * seconds for id, seconds in fluid.to_end(until).items()}
        return Outlook(first_s, drift * fluid.token_s)

    def refusal(self, job: Job, promise: Promise, predicted_s: float) -> MnemocError | None:
        """Why a waiting job's strict promise cannot be kept, now or ever; None: it can.

        predicted_s: to its first token, from its coming
        """
        if not promise.strict:
            return None
        token_s = self.drift.ratio * self.scheduler.token_s(job)
        if promise.tbt_s is not None and token_s > promise.tbt_s:
            return BadInput(
                f"tokens cannot come every {format_duration(promise.tbt_s)}: behind this prompt one alone "
                f"takes {format_duration(token_s)}",
                do="promise more time, or send a shorter prompt",
            )
        if predicted_s <= job.deadline_s:
            return None
        alone_s = self.drift.ratio * self.scheduler.alone_s(job)
        if alone_s <= job.deadline_s:
            return TooLate(predicted_s, job.deadline_s)
        return BadInput(
            f"the first token cannot come within {format_duration(job.deadline_s)}: the prompt alone takes "
            f"{format_duration(alone_s)}",
            do="promise more time, or send a shorter prompt",
        )

    def forget(self) -> None:
        """What was learnt from warming up."""
        self.drift, self.coming = Drift(), Coming()

    def landed(self, groups: Iterable[int], expected: Expected, now_s: float) -> None:
        """A micro-batch is through on its groups."""
        before_s = max([self.landed_s.get(group, -math.inf) for group in groups])
        since_s = max(before_s, expected.sent_s)
        through_s = max(expected.sent_s + expected.crossing_s, before_s + expected.pace_s)
        self.drift.saw(through_s - since_s, now_s - since_s)
        for group in groups:
            self.landed_s[group] = now_s

    def _backlog_s(self, now_s: float, under_way: Iterable[UnderWay]) -> dict[int, float]:
        """Predicted, by group, until what is on its way there has left."""
        backlog_s: dict[int, float] = {}
        for one in under_way:
            for group in one.groups:
                if group in backlog_s:
                    backlog_s[group] += one.expected.pace_s
                else:  # the one that is through next
                    began_s = max(one.expected.sent_s, self.landed_s.get(group, -math.inf))
                    backlog_s[group] = max(0.0, one.expected.pace_s - (now_s - began_s))
        return backlog_s
