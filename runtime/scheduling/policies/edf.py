"""Earliest deadline first."""

from __future__ import annotations

from ..job import Job
from .policy import Policy


def order(job: Job, now_s: float) -> float:
    return job.arrival_s + job.deadline_s


POLICY = Policy("edf", order, preempts=1.0)
