"""Micro-batches in flight, and the requests that wait for them.

Has the scheduler's micro-batches carried out (`dispatch`), and turns what comes back into tokens and
progress for the clients (`settle`). Who carries them out is behind one seam: workers, or a virtual clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..artifact import Manifest
from ..errors import MnemocError
from .job import Admitted, Job, MicroBatch
from .prefix import page_hash
from .protocol import Done
from .request import Ended, Event, FinishReason, Handle, Progress, Request, Token, Top
from .scheduler import Scheduler
from .stats import Iteration, Stats
from .tracing import Recorder

NOT_ASKED: tuple[None, Top] = (None, ())
"""The logprobs of a token that nobody asked for."""


class Executor(Protocol):
    """Whoever carries out micro-batches, and says `Done` for each of their groups."""

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        """handles: the requests, by the sid of their admission."""
        ...


@dataclass(eq=False, slots=True)
class Flight:
    """A micro-batch on its way. groups: those that have not answered; going_on: sids that want a token."""

    micro_batch: MicroBatch
    sent_s: float
    groups: set[int]
    going_on: list[int] = field(default_factory=list)
    busy_s: float = 0.0


class Flights:
    """All requests by id, those with pages by sid too, and the micro-batches that are on their way."""

    def __init__(
        self,
        manifest: Manifest,
        scheduler: Scheduler,
        executor: Executor,
        stats: Stats,
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder
        self._scheduler = scheduler
        self._executor = executor
        self._stats = stats
        self._depth, self._groups = manifest.plan.layout.spp, manifest.plan.layout.kvp
        self._page_size = manifest.plan.page_size
        self._eos = frozenset(manifest.model["eos"])
        self._handles: dict[int, Handle] = {}
        self._jobs: dict[int, Job] = {}
        self._live: dict[int, Handle] = {}
        self._flights: dict[int, Flight] = {}
        self._numbers = itertools.count()
        self._outbox: list[tuple[Handle, Event]] = []

    @property
    def room(self) -> set[int]:
        """The KVP groups that can take another micro-batch. One per stage. More while nobody decodes: one
        on each link between two stages, and at least one that keeps the first stage from waiting for the
        engine between chunks."""
        in_flight, depth = [0] * self._groups, self._depth
        for flight in self._flights.values():
            for group in flight.micro_batch.loads:
                in_flight[group] += 1
        most = depth + max(1, depth - 1)
        return {
            group
            for group, count in enumerate(in_flight)
            if count < depth or (count < most and not self._scheduler.decodes_on(group))
        }

    def accept(self, handle: Handle) -> None:
        """A new request."""
        request = handle.request
        self._handles[handle.id] = handle
        self._jobs[handle.id] = self._scheduler.add(
            handle.id,
            len(request.prompt_ids),
            request.kv_tokens,
            handle.submitted_s,
            request.promise,
            handle.hashes,
        )

    def cancel(self, id: int) -> None:
        """The client lost interest; its pages are free at once."""
        if id in self._handles:
            self._stats.cancelled += 1
            self._end(id, None)

    def dispatch(self, now_s: float) -> bool:
        """Have the next micro-batch carried out, if there is one and room for it."""
        room = self.room
        micro_batch = self._scheduler.next(now_s, room) if room else None
        if micro_batch is None:
            return False
        number = next(self._numbers)
        over = []
        for change in micro_batch.changes:
            if isinstance(change, Admitted):
                handle = self._live[change.sid] = self._handles[change.job.id]
                handle.scheduled_s = change.job.started_s
                if (
                    handle.hashes is not None
                    and not change.generated
                    and not change.job.preemptions
                ):
                    self._stats.prefix_queries += len(handle.request.prompt_ids)
                    self._stats.prefix_hits += change.cached
            elif isinstance(change, int):
                over.append(change)
        self._flights[number] = Flight(micro_batch, now_s, set(micro_batch.loads))
        if self._recorder is not None:
            self._recorder.sent(number, micro_batch, now_s)
        self._executor.send(number, micro_batch, self._live)
        for sid in over:
            self._live.pop(sid, None)
        if self._scheduler.filled:
            self._name_pages()
        return True

    def settle(self, done: Done, now_s: float) -> None:
        """A group is through with a micro-batch. What it says of requests preempted since counts for
        nothing."""
        if self._recorder is not None:
            self._recorder.done(done, now_s)
        flight = self._flights[done.number]
        flight.busy_s = max(flight.busy_s, done.busy_s)
        flight.groups.discard(done.group)
        for sid, rows in done.logits:
            if (job := self._scheduler.running.get(sid)) is not None:
                self._handles[job.id].logits_bytes.append(rows)
        flight.going_on += self._tokens(done, now_s)
        if not flight.groups:
            self._landed(done.number, flight, now_s)

    def deliver(self) -> None:
        """Hand events to the clients; done when the workers are at work again, not before."""
        events, self._outbox = self._outbox, []
        for handle, event in events:
            handle.hand_over(event)

    def fail_running(self, error: MnemocError) -> None:
        """The workers are gone: end what they worked on, forget what is in flight."""
        for job in list(self._scheduler.running.values()):
            self._stats.failed += 1
            self._end(job.id, error)
        if self._recorder is not None:
            self._recorder.lost()
        self._scheduler.restart()
        self._flights.clear()
        self._live.clear()

    def fail_all(self, error: MnemocError) -> None:
        for id in list(self._handles):
            self._stats.failed += 1
            self._end(id, error)

    def _name_pages(self) -> None:
        """Pages that decodes have filled get their hashes: others can find them from now on.

        Two at once where a preempted request's last token had filled a page, computed with the prompt then.
        """
        filled, self._scheduler.filled = self._scheduler.filled, []
        for job in filled:
            assert job.hashes is not None, "only jobs that share are listed"
            handle = self._handles[job.id]
            prompt = len(handle.request.prompt_ids)
            for start in range(
                len(job.hashes) * self._page_size, job.cached - self._page_size + 1, self._page_size
            ):
                end = start + self._page_size
                tokens = [
                    *handle.request.prompt_ids[start:end],
                    *handle.tokens[max(0, start - prompt) : max(0, end - prompt)],
                ]
                job.hashes.append(page_hash(job.hashes[-1] if job.hashes else b"", tokens))
            self._scheduler.book.fill(job.sid, job.hashes, job.cached)

    def _tokens(self, done: Done, now_s: float) -> list[int]:
        """Note the tokens, in few steps: there are thousands a second. The sids that want another."""
        running, handles = self._scheduler.running, self._handles
        outbox, eos = self._outbox, self._eos
        likely = {sid: (logprob, top) for sid, logprob, top in done.logprobs}
        going_on = []
        for sid, id in done.tokens:
            if (job := running.get(sid)) is None:
                continue
            handle, index = handles[job.id], job.tokens
            request = handle.request
            job.tokens = count = index + 1
            if not index:
                job.first_token_s = now_s
            finish: FinishReason | None = None
            if count >= request.max_tokens or id in eos or request.sampling.stop_ids:
                finish = self._finish(request, id, count)
            logprob, top = likely.get(sid, NOT_ASKED) if likely else NOT_ASKED
            token = Token(id, index, now_s, finish, logprob, top)
            handle.record_token(token)
            outbox.append((handle, token))
            if finish is None:
                going_on.append(sid)
            else:
                self._ended(job)
            self._stats.generated_tokens += 1
        return going_on

    def _ended(self, job: Job) -> None:
        """It has all its tokens."""
        self._stats.finished += 1
        self._scheduler.drop(job)
        self._forget(job.id)

    def _finish(self, request: Request, token: int, count: int) -> FinishReason | None:
        sampling = request.sampling
        ends = token in sampling.stop_ids or (not sampling.ignore_eos and token in self._eos)
        if ends and count >= sampling.min_tokens:
            return "stop"
        return "length" if count == request.max_tokens else None

    def _landed(self, number: int, flight: Flight, now_s: float) -> None:
        del self._flights[number]
        micro_batch = flight.micro_batch
        wall_s = now_s - flight.sent_s
        self._scheduler.settled(micro_batch, flight.going_on, wall_s)
        prefilled = sum(chunk.rows for chunk in micro_batch.chunks)
        self._stats.prompt_tokens += prefilled
        self._stats.iterations.append(
            Iteration(len(micro_batch.decodes), prefilled, wall_s, flight.busy_s)
        )
        for chunk in micro_batch.chunks:
            job = self._scheduler.running.get(chunk.sid)
            if job is not None and not chunk.ends:
                self._post(self._handles[job.id], self._progress(job, chunk.left_s, now_s))

    def _progress(self, job: Job, left_s: float, now_s: float) -> Progress:
        """How far the prompt is; the plan's estimate of the rest, corrected by the pace so far."""
        predicted_s = job.whole_s - left_s
        pace = 1.0
        if job.started_s is not None and predicted_s > 0:
            pace = (now_s - job.started_s) / predicted_s
        return Progress(job.processed, job.prompt, left_s * pace)

    def _end(self, id: int, error: MnemocError | None) -> None:
        self._scheduler.drop(self._jobs[id])
        self._post(self._forget(id), Ended(error))

    def _forget(self, id: int) -> Handle:
        del self._jobs[id]
        return self._handles.pop(id)

    def _post(self, handle: Handle, event: Event) -> None:
        handle.record(event)
        self._outbox.append((handle, event))
