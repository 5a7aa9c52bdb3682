"""First come, first served."""

from __future__ import annotations

from ..job import Job
from .policy import Policy


def order(job: Job, now_s: float) -> float:
    return job.arrival_s


POLICY = Policy("fcfs", order)
