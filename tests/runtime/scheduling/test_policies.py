"""Whose prompt goes first."""

from __future__ import annotations

import pytest
from mnemoc.runtime.scheduling.job import Job
from mnemoc.runtime.scheduling.policies import POLICIES

from .conftest import make, rows

ORDERS = {
    "lars": [1, 2, 0],  # slack / work: 0.9, 0.25, 0.8
    "lrs": [1, 2, 0],
    "edf": [1, 0, 2],
    "fcfs": [0, 1, 2],
    "priority": [2, 0, 1],
}


def test_the_prompt_with_the_least_relative_slack_goes_first() -> None:
    scheduler = make(tbt_s=0.11)
    scheduler.add(0, prompt=400, kv_tokens=400, now_s=0.0)
    scheduler.add(1, prompt=45, kv_tokens=45, now_s=0.0)
    assert list(rows(scheduler)) == [0], "both have time: the long one's share is smaller"
    assert list(rows(scheduler, 0.6)) == [1], "now the short one is late"


@pytest.mark.parametrize("policy", ORDERS)
def test_policies_order_prompts_as_their_names_say(policy: str) -> None:
    """arrival, deadline and left as slack: 8 of 10 s of work; 0.9 of 4; 5 of 6 — by hand below."""
    asked = (
        # arrival, deadline, work, priority → due, slack at 2, relative
        (0.0, 20.0, 10.0, 0),  # 20, 8.0, 0.80
        (1.0, 6.0, 4.0, 1),  # 7, 1.0, 0.25
        (2.0, 19.0, 12.0, -1),  # 21, 7.0, 0.58
    )
    jobs = [
        Job(id, 10, 10, arrival, work, work, deadline, 1.0, priority, False, None)
        for id, (arrival, deadline, work, priority) in enumerate(asked)
    ]
    order = POLICIES[policy].order
    assert [job.id for job in sorted(jobs, key=lambda job: order(job, 2.0))] == ORDERS[policy]


def test_absolute_slack_is_misled_where_lengths_differ() -> None:
    long = Job(0, 10, 10, 0.0, 100.0, 100.0, 110.0, 1.0, 0, True, None)
    short = Job(1, 10, 10, 0.0, 1.0, 1.0, 12.0, 1.0, 0, False, None)
    lrs, lars = (POLICIES[name].order for name in ("lrs", "lars"))
    assert lrs(long, 0.0) < lrs(short, 0.0)
    assert lrs(long, 5.0) > lrs(short, 5.0) - 5
    assert lars(long, 0.0) < lars(short, 0.0)
    assert lars(long, 11.5) > lars(short, 11.5), "by now the short one has no time left"
