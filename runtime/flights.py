"""Micro-batches in flight, and the requests that wait for them.

Turns the scheduler's micro-batches into steps for the workers (`dispatch`), and what comes back
into tokens and progress for the clients (`settle`).
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from typing import Protocol

from ..artifact import Manifest
from ..errors import MnemocError
from .protocol import Admission, Done, Step
from .request import Ended, Event, FinishReason, Handle, Progress, Token
from .scheduler import Change, Job, MicroBatch, Scheduler
from .stats import Iteration, Stats


class Executor(Protocol):
    """Whoever carries out steps: workers here, a virtual clock in a simulation."""

    def send(self, step: Step) -> None: ...


@dataclass(eq=False)
class Flight:
    """A micro-batch on its way. groups: those that have not answered; going_on: want another token."""

    micro_batch: MicroBatch
    sent_s: float
    groups: set[int]
    going_on: list[int] = field(default_factory=list)
    busy_s: float = 0.0


class Flights:
    """All requests by id, and up to one micro-batch per stage in flight."""

    def __init__(
        self, manifest: Manifest, scheduler: Scheduler, executor: Executor, stats: Stats
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._stats = stats
        self._depth = manifest.plan.layout.spp
        self._eos = frozenset(manifest.model["eos"])
        self._handles: dict[int, Handle] = {}
        self._flights: dict[int, Flight] = {}
        self._numbers = itertools.count()
        self._outbox: list[tuple[Handle, Event]] = []

    @property
    def room(self) -> bool:
        """One micro-batch per stage. More while nobody decodes: one on each link between two stages, and
        at least one that keeps the first stage from waiting for the engine between chunks."""
        ahead = 0 if self._scheduler.decoding else max(1, self._depth - 1)
        return len(self._flights) < self._depth + ahead

    def accept(self, handle: Handle) -> None:
        """A new request."""
        self._handles[handle.id] = handle
        prompt, cached = len(handle.request.prompt_ids), handle.request.kv_tokens
        self._scheduler.add(handle.id, prompt, cached, handle.submitted_s)

    def cancel(self, id: int) -> None:
        """The client lost interest; its pages are free at once."""
        if id in self._handles:
            self._stats.cancelled += 1
            self._end(id, None)

    def dispatch(self, now_s: float) -> bool:
        """Send the next micro-batch, if there is one."""
        micro_batch = self._scheduler.next(now_s)
        if micro_batch is None:
            return False
        number = next(self._numbers)
        step = Step(
            number,
            [self._change(change, now_s) for change in micro_batch.changes],
            [(id, self._handles[id].tokens[-1]) for id in micro_batch.decodes],
            [(chunk.id, chunk.rows) for chunk in micro_batch.chunks],
        )
        self._flights[number] = Flight(micro_batch, now_s, set(micro_batch.groups))
        self._executor.send(step)
        return True

    def settle(self, done: Done, now_s: float) -> None:
        """A group is through with a micro-batch."""
        flight = self._flights[done.number]
        flight.busy_s = max(flight.busy_s, done.busy_s)
        flight.groups.discard(done.group)
        for id, rows in done.logits:
            if id in self._handles:
                self._handles[id].logits_bytes.append(rows)
        for id, token in done.tokens:
            if id in self._handles and self._token(self._handles[id], token, now_s):
                flight.going_on.append(id)
        if not flight.groups:
            self._landed(done.number, flight, now_s)

    def deliver(self) -> None:
        """Hand events to the clients; done when the workers are at work again, not before."""
        events, self._outbox = self._outbox, []
        for handle, event in events:
            handle.hand_over(event)

    def fail_running(self, error: MnemocError) -> None:
        """The workers are gone: end what they worked on, forget what is in flight."""
        for id in list(self._scheduler.running):
            self._stats.failed += 1
            self._end(id, error)
        self._scheduler.forget_changes()
        self._flights.clear()

    def fail_all(self, error: MnemocError) -> None:
        for id in list(self._handles):
            self._stats.failed += 1
            self._end(id, error)

    def _change(self, change: Change, now_s: float) -> Admission | int:
        if change.job is None:
            return change.id
        handle = self._handles[change.id]
        handle.scheduled_s = now_s
        request = handle.request
        return Admission(
            change.id,
            change.job.home,
            change.job.kv_tokens,
            request.sampling,
            request.logits,
            array("i", request.prompt_ids),
        )

    def _token(self, handle: Handle, token: int, now_s: float) -> bool:
        """Note a token; whether its request wants another."""
        index = len(handle.tokens)
        finish = self._finish(handle, token, index + 1)
        self._stats.generated_tokens += 1
        if finish is not None:
            self._stats.finished += 1
            self._scheduler.drop(handle.id)
            del self._handles[handle.id]
        self._post(handle, Token(token, index, now_s, finish))
        return finish is None

    def _finish(self, handle: Handle, token: int, count: int) -> FinishReason | None:
        sampling = handle.request.sampling
        ends = token in sampling.stop_ids or (token in self._eos and not sampling.ignore_eos)
        if ends and count >= sampling.min_tokens:
            return "stop"
        return "length" if count == handle.request.max_tokens else None

    def _landed(self, number: int, flight: Flight, now_s: float) -> None:
        del self._flights[number]
        micro_batch = flight.micro_batch
        self._scheduler.settled(micro_batch, flight.going_on)
        prefilled = sum(chunk.rows for chunk in micro_batch.chunks)
        self._stats.prompt_tokens += prefilled
        wall_s = now_s - flight.sent_s
        self._stats.iterations.append(
            Iteration(len(micro_batch.decodes), prefilled, wall_s, flight.busy_s)
        )
        for chunk in micro_batch.chunks:
            job = self._scheduler.running.get(chunk.id)
            if job is not None and not chunk.ends:
                self._post(self._handles[chunk.id], self._progress(job, now_s))

    def _progress(self, job: Job, now_s: float) -> Progress:
        """How far the prompt is; the plan's estimate of the rest, corrected by the pace so far."""
        left_s = self._scheduler.eta_s(job)
        predicted_s = job.work_s - left_s
        pace = 1.0
        if job.started_s is not None and predicted_s > 0:
            pace = (now_s - job.started_s) / predicted_s
        return Progress(job.processed, job.prompt, left_s * pace)

    def _end(self, id: int, error: MnemocError | None) -> None:
        self._scheduler.drop(id)
        self._post(self._handles.pop(id), Ended(error))

    def _post(self, handle: Handle, event: Event) -> None:
        handle.record(event)
        self._outbox.append((handle, event))
