"""What the engine counts as it runs, in its own thread; it outlives the workers. Any thread may read it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..request import FinishReason, Handle
from ..scheduling.job import Job, MicroBatch
from .machine import Work
from .tally import Tallies

KEPT = 4096
"""Iterations that are kept."""
ALLOWED_S = 1e-9
"""How late is not late: less than rounding."""


class Iteration(NamedTuple):
    """One micro-batch: its tokens, dispatch to last reply, and what of it the last stage was busy.

    predicted_s: of the same time, behind what was on its way; chunks: (request, rows) of its prompts
    """

    decodes: int
    prefill_tokens: int
    wall_s: float
    busy_s: float
    predicted_s: float = 0.0
    chunks: tuple[tuple[int, int], ...] = ()


@dataclass
class Parts:
    """Seconds that micro-batches took by what was done: in the engine's thread to choose the rows, to send
    them and to make tokens of what came back; in the last stage; and waiting, for other stages and messages.
    """

    schedule: float = 0.0
    dispatch: float = 0.0
    settle: float = 0.0
    last_stage: float = 0.0
    waiting: float = 0.0


@dataclass
class Promises:
    """Of requests that ended with all their tokens, or failed: those whose promise was kept, or missed."""

    ttft_kept: int = 0
    ttft_missed: int = 0
    tbt_kept: int = 0
    tbt_missed: int = 0


@dataclass
class Stats:
    """Counters since the start, and the latest iterations.

    prefix_queries: tokens of prompts that were looked for in pages; prefix_hits: that were found there. A
        request counts when it first comes, not when it comes back after a preemption.
    finished: with all their tokens; stopped: of these, by a stop token or string; late_tokens: behind their
    promise; deaths: of the workers, all of them at once; restarts: when they were up again
    """

    prompt_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0
    finished: int = 0
    stopped: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    late_tokens: int = 0
    deaths: int = 0
    restarts: int = 0
    work: Work = field(default_factory=Work)
    parts: Parts = field(default_factory=Parts)
    promises: Promises = field(default_factory=Promises)
    tallies: Tallies = field(default_factory=Tallies)
    iterations: deque[Iteration] = field(default_factory=lambda: deque(maxlen=KEPT))

    def clear(self) -> None:
        """Begin again."""
        self.__init__()  # type: ignore[misc]

    def first_token(self, job: Job, handle: Handle, now_s: float) -> bool:
        """It came; whether too late."""
        self.generated_tokens += 1
        ttft_s = now_s - job.arrival_s
        self.tallies.time_to_first_token_seconds.add(ttft_s)
        if handle.predicted_ttft_s is not None:
            ratio = handle.predicted_ttft_s / max(ttft_s, ALLOWED_S)
            self.tallies.ttft_predicted_over_measured.add(ratio)
        return ttft_s > job.deadline_s

    def later_tokens(self, before: Mapping[float, int], now_s: float) -> None:
        """They came. before: how many there are, by when the token before each came"""
        for before_s, count in before.items():
            self.generated_tokens += count
            self.tallies.inter_token_latency_seconds.add(now_s - before_s, count)

    def late_token(self, job: Job) -> bool:
        """A later token came behind its promise; whether it is the first of its request."""
        self.late_tokens += 1
        job.late += 1
        return job.late == 1

    def landed(self, micro_batch: MicroBatch, iteration: Iteration) -> None:
        """A micro-batch has left the last stage."""
        tallies, rows = self.tallies, iteration.decodes + iteration.prefill_tokens
        self.prompt_tokens += iteration.prefill_tokens
        self.iterations.append(iteration)
        self.work.add(rows, micro_batch.loads.values())
        self.parts.last_stage += iteration.busy_s
        self.parts.waiting += max(0.0, iteration.wall_s - iteration.busy_s)
        tallies.iteration_tokens_total.add(rows)
        tallies.iteration_time_seconds.add(iteration.wall_s)
        if iteration.wall_s > 0:
            tallies.iteration_time_predicted_over_measured.add(
                iteration.predicted_s / iteration.wall_s
            )

    def ended(self, job: Job, handle: Handle, reason: FinishReason | None, now_s: float) -> None:
        """A request is over. reason: None if it failed"""
        if reason == "cancelled":
            self.cancelled += 1
            return
        in_time = job.first_token_s is not None and job.in_time(now_s)
        self.promises.ttft_kept += in_time
        self.promises.ttft_missed += not in_time
        self.promises.tbt_kept += reason is not None and not job.late
        self.promises.tbt_missed += reason is None or job.late > 0
        if reason is None:
            self.failed += 1
            return
        self.finished += 1
        self.stopped += reason == "stop"
        self._times(job, handle, now_s)

    def _times(self, job: Job, handle: Handle, now_s: float) -> None:
        tallies, first_s = self.tallies, job.first_token_s
        began_s = handle.scheduled_s
        assert first_s is not None and began_s is not None, "it has a token"
        tallies.e2e_request_latency_seconds.add(now_s - job.arrival_s)
        tallies.request_queue_time_seconds.add(began_s - job.arrival_s)
        tallies.request_prefill_time_seconds.add(first_s - began_s)
        tallies.request_decode_time_seconds.add(now_s - first_s)
        tallies.request_inference_time_seconds.add(now_s - began_s)
        tallies.request_prompt_tokens.add(len(handle.request.prompt_ids))
        tallies.request_generation_tokens.add(job.tokens)
        tallies.request_params_max_tokens.add(handle.request.max_tokens)
        if job.tokens > 1:
            mean_s = (now_s - first_s) / (job.tokens - 1)
            tallies.request_time_per_output_token_seconds.add(mean_s)
