"""What the engine is doing, as it was at one moment: frozen, so that any thread may read it.

The engine's own thread takes it when somebody asks (`Engine.look`), between two steps: nobody else reads
what the scheduler is changing. A look costs the engine a pass over the requests in flight, a forecast of
their first tokens, and a record for each of those that are shown.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from ..request import Handle
from ..scheduling.forecast import Outlook
from ..scheduling.job import Job
from ..scheduling.scheduler import Scheduler
from .stats import Iteration, Stats

State = Literal["queued", "prefill", "decode", "preempted"]
STATES: tuple[State, ...] = ("prefill", "queued", "preempted", "decode")
"""In the order in which requests are shown: first those that wait for their first token."""

SHOWN_BATCHES = 12


@dataclass(frozen=True)
class InFlight:
    """A request that is not over. Times in seconds, since it came unless said otherwise.

    id: the engine's; name: what the client's side calls it, or ""
    prompt, prefilled: its tokens, and how many are in pages; generated: of at most max_tokens
    home: its first KVP group, None while it has no pages; groups: all of those that it is on by now
    deadline_s: when its first token is due; ttft_s: when that came; tbt_s: its promise between tokens
    eta_s: predicted from now to its first token, with all that runs and waits (`forecast`); None once it came
    left_s: predicted from now to its last token, if it takes all that it may
    predicted_ttft_s: as was predicted when it came
    slack_s: how long its prompt could stand idle and be in time; relative_slack: over the prompt's work
    kept: whether no promise to it is broken so far
    """

    id: int
    name: str
    state: State
    prompt: int
    prefilled: int
    generated: int
    max_tokens: int
    home: int | None
    groups: tuple[int, ...]
    age_s: float
    deadline_s: float
    tbt_s: float
    ttft_s: float | None
    eta_s: float | None
    left_s: float | None
    predicted_ttft_s: float | None
    slack_s: float | None
    relative_slack: float | None
    kept: bool
    preemptions: int

    @classmethod
    def of(
        cls, job: Job, handle: Handle, scheduler: Scheduler, outlook: Outlook | None, now_s: float
    ) -> InFlight:
        """outlook: when first tokens will come; None: nobody foretells"""
        prompt, growth = len(handle.request.prompt_ids), scheduler.growth
        first_s, waits = job.first_token_s, job.first_token_s is None
        shards = range(growth.shards(job.processed)) if job.sid >= 0 else ()
        eta_s = left_s = None
        if outlook is not None:
            again_s = outlook.first_s.get(job.id, 0.0)  # after a preemption, to its next token
            eta_s = again_s if waits else None
            left_s = again_s + (handle.request.max_tokens - job.tokens) * outlook.token_s
        return cls(
            id=job.id,
            name=handle.request.origin.id,
            state=state(job),
            prompt=prompt,
            prefilled=min(prompt, job.processed),
            generated=job.tokens,
            max_tokens=handle.request.max_tokens,
            home=job.home if job.sid >= 0 else None,
            groups=tuple(growth.group(job.home, shard) for shard in shards),
            age_s=now_s - job.arrival_s,
            deadline_s=job.deadline_s,
            tbt_s=job.tbt_s,
            ttft_s=None if first_s is None else first_s - job.arrival_s,
            eta_s=eta_s,
            left_s=left_s,
            predicted_ttft_s=handle.predicted_ttft_s,
            slack_s=job.slack_s(now_s) if waits else None,
            relative_slack=job.relative_slack(now_s) if waits else None,
            kept=job.in_time(now_s) and not job.late,
            preemptions=job.preemptions,
        )


@dataclass(frozen=True)
class GroupPages:
    """KV pages of one KVP group: all, those that requests hold, those kept for whoever comes with the same
    prefix, and those of them in host memory."""

    total: int
    held: int
    cached: int
    on_host: int


@dataclass(frozen=True)
class Snapshot:
    """at_s: on the engine's clock; counts: requests by state; requests: the first of them, by state and age
    wanted: those that were asked for by id and are in flight; batches: the latest micro-batches, newest first
    token_s: predicted from one token of a decode to its next; None: nobody foretells
    """

    at_s: float
    counts: Mapping[State, int]
    requests: tuple[InFlight, ...]
    wanted: Mapping[int, InFlight]
    groups: tuple[GroupPages, ...]
    batches: tuple[Iteration, ...]
    token_s: float | None


@dataclass(frozen=True)
class Look:
    """Somebody asks. answer: called in the engine's thread, so it only passes the snapshot on.

    most: requests that are shown; wanted: ids of requests that are wanted in any case
    """

    answer: Callable[[Snapshot], object]
    most: int = 0
    wanted: Collection[int] = ()


def take(
    look: Look,
    jobs: Mapping[int, Job],
    handles: Mapping[int, Handle],
    scheduler: Scheduler,
    stats: Stats,
    outlook: Outlook | None,
    now_s: float,
) -> Snapshot:
    """In the engine's thread."""
    by_state: dict[State, list[Job]] = {name: [] for name in STATES}
    for job in jobs.values():
        by_state[state(job)].append(job)
    shown: list[Job] = []
    for some in by_state.values():
        shown += heapq.nsmallest(look.most - len(shown), some, key=lambda job: job.arrival_s)
    wanted = [jobs[id] for id in look.wanted if id in jobs]
    records = {
        job.id: InFlight.of(job, handles[job.id], scheduler, outlook, now_s)
        for job in (*shown, *wanted)
    }
    return Snapshot(
        now_s,
        {name: len(some) for name, some in by_state.items()},
        tuple(records[job.id] for job in shown),
        {job.id: records[job.id] for job in wanted},
        pages(scheduler),
        tuple(itertools.islice(reversed(stats.iterations), SHOWN_BATCHES)),
        None if outlook is None else outlook.token_s,
    )


def state(job: Job) -> State:
    if job.sid < 0:
        return "preempted" if job.preemptions else "queued"
    return "prefill" if job.processed < job.prompt else "decode"


def pages(scheduler: Scheduler) -> tuple[GroupPages, ...]:
    """From any thread: each figure is one read."""
    return tuple(GroupPages(*counts) for counts in scheduler.book.counts())
