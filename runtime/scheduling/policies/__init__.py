"""Whose prompt goes first: each policy is a file with one pure function, listed here by name."""

from __future__ import annotations

from . import edf, fcfs, lars, lars_slack, lrs, priority
from .policy import Policy

__all__ = ["DEFAULT", "POLICIES", "Policy"]

POLICIES = {
    policy.name: policy
    for policy in (
        lars_slack.POLICY,
        lars.POLICY,
        lrs.POLICY,
        edf.POLICY,
        fcfs.POLICY,
        priority.POLICY,
    )
}
DEFAULT = lars_slack.POLICY
