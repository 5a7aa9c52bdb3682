"""The request's own priority, lower first; among equals, first come, first served."""

from __future__ import annotations

from ..job import Job
from .policy import Policy


def order(job: Job, now_s: float) -> float:
    return job.priority


POLICY = Policy("priority", order, preempts=1.0)
