"""A scheduler with invented costs and no workers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mnemoc.artifact import ChunkRule, Memory, Optimality, Plan, Prediction, Stage, Workload
from mnemoc.layout import Layout
from mnemoc.runtime.scheduling.cost import Load
from mnemoc.runtime.scheduling.job import Job, MicroBatch
from mnemoc.runtime.scheduling.overrun import LEAST
from mnemoc.runtime.scheduling.policies import POLICIES
from mnemoc.runtime.scheduling.scheduler import Scheduler


class Rate:
    """A millisecond a row and a microsecond a query–key pair, in each of two stages."""

    def pace_s(self, load: Load) -> float:
        return load.T * 1e-3 + load.QK * 1e-6

    def crossing_s(self, load: Load) -> float:
        return 2 * self.pace_s(load)

    def swap_s(self, pages: int) -> float:
        return math.inf


PLAN = Plan(
    target="cpu",
    dtype="float32",
    layout=Layout(1, 2, 1),
    stages=(Stage("stage_0", 0, 1), Stage("stage_1", 1, 1)),
    chunks=(ChunkRule(0, 100, 50, 1, 0.0), ChunkRule(100, 1000, 20, 1, 0.0)),
    page_size=10,
    num_pages=100,
    stripe_tokens=1000,
    max_batch=4,
    max_rows=54,
    predicted=Prediction(1.0, 1.0, 1.0, {}, {}),
    memory=Memory(0, 0, 0, 0, 0, 0, 0, ""),
    optimality=Optimality("gpus", 1.0, 1.0, 0.0),
    binding="none",
    alternatives=(),
)
ON_TWO_GROUPS = dataclasses.replace(PLAN, layout=Layout(1, 2, 2), stripe_tokens=100)
HELIX = dataclasses.replace(ON_TWO_GROUPS, layout=Layout(1, 2, 2, "helix"))


def make(
    plan: Plan = PLAN, tbt_s: float = 1.0, policy: str = "lars", ttft_s: float = 100.0
) -> Scheduler:
    """As it is after a while: it has seen micro-batches take what was predicted."""
    scheduler = Scheduler(plan, Rate(), Workload(1000, ttft_s, tbt_s), POLICIES[policy])
    scheduler.overrun.ratio = LEAST
    return scheduler


def step(scheduler: Scheduler, now_s: float = 0.0) -> MicroBatch:
    """A micro-batch that must be there."""
    micro_batch = scheduler.next(now_s)
    assert micro_batch is not None
    return micro_batch


def rows(scheduler: Scheduler, now_s: float = 0.0) -> dict[int, int]:
    """The next micro-batch's chunk rows, by request."""
    micro_batch = scheduler.next(now_s)
    chunks = micro_batch.chunks if micro_batch else ()
    return {scheduler.running[chunk.sid].id: chunk.rows for chunk in chunks}


def decode(
    scheduler: Scheduler, prompts: Sequence[int], new: int = 10, first: int = 100
) -> list[Job]:
    """Requests that have their first token, and wait for the next."""
    jobs = [scheduler.add(first + i, n, n + new - 1, 0.0) for i, n in enumerate(prompts)]
    while any(job.processed < job.prompt for job in jobs):
        sent = []
        while micro_batch := scheduler.next(0.0):
            sent.append(micro_batch)
        for micro_batch in sent:
            going_on = [chunk.sid for chunk in micro_batch.chunks if chunk.ends]
            for job in jobs:
                if job.sid in going_on:
                    job.tokens = 1
                    job.begin(0.0)
            scheduler.settled(
                micro_batch, [*micro_batch.decodes, *going_on], micro_batch.expected.through_s
            )
    return jobs
