"""LARS, length-aware relative slack (the paper's): what slack is left, as a share of all of a prompt's work.

    ρ = (arrival + deadline − now − remaining work) / total work

A short prompt that waits loses relative slack quickly and goes first; a long one is not put off for good.
"""

from __future__ import annotations

from ..job import Job
from .policy import Policy


def order(job: Job, now_s: float) -> float:
    return job.relative_slack(now_s)


POLICY = Policy("lars", order, preempts=0.5)
