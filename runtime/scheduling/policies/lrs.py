"""Least remaining slack, in seconds: misleading where lengths differ widely (the paper's baseline)."""

from __future__ import annotations

from ..job import Job
from .policy import Policy


def order(job: Job, now_s: float) -> float:
    return job.slack_s(now_s)


POLICY = Policy("lrs", order, preempts=1.0)
