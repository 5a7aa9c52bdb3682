"""Micro-batches in flight, and the requests that wait for them.

Has the scheduler's micro-batches carried out (`dispatch`), and turns what comes back into tokens and
progress for the clients (`settle`). Who carries them out is behind one seam: workers, or a virtual clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..artifact import Manifest
from ..errors import MnemocError
from .executor.suspects import Deadly, Suspects, Violence
from .protocol.messages import Done
from .request import (
    Ended,
    Event,
    FinishReason,
    Handle,
    Progress,
    Request,
    Token,
    Top,
    now_s,
)
from .scheduling.forecast import Forecast, Outlook, UnderWay
from .scheduling.job import Admitted, Job, MicroBatch
from .scheduling.prefix import page_hash
from .scheduling.scheduler import Scheduler
from .telemetry.snapshot import Look, take
from .telemetry.stats import ALLOWED_S, Iteration, Stats
from .telemetry.tracing import Recorder
from .telemetry.witness import Witness

NOT_ASKED: tuple[None, Top] = (None, ())
"""The logprobs of a token that nobody asked for."""


class Executor(Protocol):
    """Whoever carries out micro-batches, and says `Done` for each of their groups."""

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        """handles: the requests, by the sid of their admission."""
        ...


@dataclass(eq=False, slots=True)
class Flight:
    """A micro-batch on its way. groups: those that have not answered; going_on: sids that want a token.

    chunks: (request, rows) of its prompts; follows: another was on its way there when it was sent
    """

    micro_batch: MicroBatch
    sent_s: float
    groups: set[int]
    chunks: tuple[tuple[int, int], ...] = ()
    follows: bool = False
    going_on: list[int] = field(default_factory=list)
    busy_s: float = 0.0
    pace_s: float = 0.0


class Flights:
    """All requests by id, those with pages by sid too, and the micro-batches that are on their way.

    witness: is told of what happens to requests
    """

    def __init__(
        self,
        manifest: Manifest,
        scheduler: Scheduler,
        executor: Executor,
        stats: Stats,
        recorder: Recorder | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        """forecast: who says of each request when it will have its first token; None: nobody does."""
        self._forecast = forecast
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
        self._suspects = Suspects()
        self._numbers = itertools.count()
        self._outbox: list[tuple[Handle, Event]] = []
        self._landed_s = [0.0] * self._groups
        self.witness = Witness()

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

    @property
    def in_the_air(self) -> bool:
        """Whether any micro-batch is on its way."""
        return bool(self._flights)

    @property
    def predicted_s(self) -> float:
        """For all micro-batches on their way, one after the other."""
        predicted_s = self._scheduler.predicted_s
        return sum(predicted_s(flight.micro_batch) for flight in self._flights.values())

    def accept(self, handles: Sequence[Handle], now_s: float) -> None:
        """New requests, of one moment. One forecast serves all of them, for it takes longer the more there
        are; but for strict promises: who is refused takes no time from those behind.
        """
        for strict, some in itertools.groupby(handles, lambda it: it.request.promise.strict):
            for alike in ([handle] for handle in some) if strict else (list(some),):
                self._accept(alike, now_s)

    def _accept(self, handles: Sequence[Handle], now_s: float) -> None:
        jobs = []
        for handle in handles:
            request = handle.request
            self._handles[handle.id] = handle
            self._jobs[handle.id] = job = self._scheduler.add(
                handle.id,
                len(request.prompt_ids),
                request.kv_tokens,
                handle.submitted_s,
                request.promise,
                handle.hashes,
            )
            jobs.append(job)
        come = list(zip(handles, jobs, strict=True))
        if (forecast := self._forecast) is not None:
            outlook = self._outlook(forecast, now_s, until=jobs[0] if len(jobs) == 1 else None)
            come = [pair for pair in come if self._foretold(forecast, outlook, *pair, now_s)]
        for handle, job in come:
            self.witness.came(job, handle)

    def cancel(self, id: int) -> None:
        """The client lost interest, or has what it wanted; its pages are free at once."""
        if id in self._handles:
            self._end(id, None)

    def dispatch(self, now_s: float) -> bool:
        """Have the next micro-batch carried out, if there is one and room for it."""
        began_s = time.perf_counter()
        room = self.room
        micro_batch = self._scheduler.next(now_s, room) if room else None
        if micro_batch is None:
            return False
        chosen_s = time.perf_counter()
        number = next(self._numbers)
        over = []
        for change in micro_batch.changes:
            if isinstance(change, Admitted):
                handle = self._live[change.sid] = self._handles[change.job.id]
                if handle.scheduled_s is None:
                    handle.scheduled_s = change.job.started_s
                if not change.job.preemptions:
                    handle.cached_tokens = change.cached
                self.witness.admitted(change.job, handle)
                if (
                    handle.hashes is not None
                    and not change.generated
                    and not change.job.preemptions
                ):
                    self._stats.prefix_queries += len(handle.request.prompt_ids)
                    self._stats.prefix_hits += change.cached
            elif isinstance(change, int):
                over.append(change)
        chunks = tuple([(self._live[chunk.sid].id, chunk.rows) for chunk in micro_batch.chunks])
        here, others = micro_batch.loads.keys(), self._flights.values()
        follows = not micro_batch.decodes and any(
            not here.isdisjoint(one.micro_batch.loads) for one in others
        )
        flight = Flight(micro_batch, now_s, set(micro_batch.loads), chunks, follows)
        self._flights[number] = flight
        if self._forecast is not None:
            flight.pace_s = self._forecast.pace_s(micro_batch.loads)
        if self._recorder is not None:
            self._recorder.sent(number, micro_batch, now_s)
        self._executor.send(number, micro_batch, self._live)
        for sid in over:
            self._live.pop(sid, None)
        if self._scheduler.filled:
            self._name_pages()
        parts = self._stats.parts
        parts.schedule += chosen_s - began_s
        parts.dispatch += time.perf_counter() - chosen_s
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

    def look(self, look: Look, now_s: float) -> None:
        """Answer somebody who wants to see what is going on."""
        outlook = None
        if self._forecast is not None and (look.most or look.wanted):
            outlook = self._outlook(self._forecast, now_s)
        known = self._jobs, self._handles, self._scheduler, self._stats
        look.answer(take(look, *known, outlook, now_s))

    def replay(self, error: MnemocError) -> bool:
        """The workers are gone: forget what is in flight; whoever ran is to go on where it stopped.

        But for a request whose fault it must be: that one fails. Returns whether there was one.
        """
        running = self._scheduler.running
        present = {
            job.id: (job.computed, job.cached)
            for flight in self._flights.values()
            for sid in (*flight.micro_batch.decodes, *(c.sid for c in flight.micro_batch.chunks))
            if (job := running.get(sid)) is not None
        }
        self._scheduler.restart()
        self._flights.clear()
        self._live.clear()
        if self._recorder is not None:
            self._recorder.lost()
        guilty = None if isinstance(error, Violence) else self._suspects.died(present)
        if guilty is not None:
            deaths = self._suspects.deaths(guilty)
            story = f"the workers died {deaths} times in a row over this request: {error}"
            fault = Deadly(story)
            for note in getattr(error, "__notes__", ()):
                fault.add_note(note)
            self._end(guilty, fault)
        self._scheduler.admission.hold(self._suspects.held)
        return guilty is not None

    def fail_all(self, error: MnemocError) -> None:
        for id in list(self._handles):
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
        before: dict[float, int] = {}  # later tokens, by when the one before came
        going_on = []
        for sid, id in done.tokens:
            if (job := running.get(sid)) is None:
                continue
            handle, index = handles[job.id], job.tokens
            request = handle.request
            job.tokens = count = index + 1
            if index:
                before_s = handle.token_times_s[-1]
                before[before_s] = before.get(before_s, 0) + 1
                broken = job.late_s(now_s) > ALLOWED_S and self._stats.late_token(job)
            else:
                job.first_token_s = now_s
                broken = self._stats.first_token(job, handle, now_s)
                self.witness.first_token(job, handle)
            if broken:
                self.witness.broken(job, handle)
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
                self._over(job, handle, finish, None, now_s)
                self._scheduler.drop(job)
                self._forget(job.id)
        self._stats.later_tokens(before, now_s)
        return going_on

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
        if self._forecast is not None:
            self._forecast.landed(micro_batch.loads, flight.pace_s, flight.sent_s, now_s)
        self._scheduler.settled(micro_batch, flight.going_on, wall_s)
        if self._suspects:
            self._clear(micro_batch)
        before_s = max(self._landed_s[group] for group in micro_batch.loads)
        for group in micro_batch.loads:
            self._landed_s[group] = now_s
        self._stats.landed(
            micro_batch,
            Iteration(
                len(micro_batch.decodes),
                sum(chunk.rows for chunk in micro_batch.chunks),
                wall_s,
                flight.busy_s,
                self._scheduler.predicted_s(micro_batch, follows=flight.follows),
                flight.chunks,
            ),
            now_s - max(flight.sent_s, before_s) if flight.follows else wall_s,
        )
        for chunk in micro_batch.chunks:
            job = self._scheduler.running.get(chunk.sid)
            if job is not None and not chunk.ends:
                progress = Progress(job.processed, job.prompt, job.eta_s(chunk.left_s, now_s))
                self._post(self._handles[job.id], progress)

    def _outlook(self, forecast: Forecast, now_s: float, until: Job | None = None) -> Outlook:
        """When first tokens will come; until: as in `Forecast.look`."""
        flights = self._flights.values()
        under_way = [UnderWay(flight.groups, flight.pace_s, flight.sent_s) for flight in flights]
        return forecast.look(now_s, under_way, until)

    def _foretold(
        self, forecast: Forecast, outlook: Outlook, handle: Handle, job: Job, now_s: float
    ) -> bool:
        """Note when its first token will come; False if its strict promise cannot be kept: it is refused."""
        eta_s = outlook.first_s[job.id]
        handle.predicted_ttft_s = now_s - handle.submitted_s + eta_s
        refusal = forecast.refusal(job, handle.request.promise, handle.predicted_ttft_s)
        if refusal is None:
            forecast.coming.saw(job, now_s)
            return True
        self._stats.refused += 1
        self._scheduler.drop(job)
        self._post(self._forget(job.id), Ended(refusal))
        return False

    def _end(self, id: int, error: MnemocError | None) -> None:
        """It failed; or, without an error, nobody wants more of it."""
        job, handle = self._jobs[id], self._handles[id]
        reason = None if error else handle.finish_reason or "cancelled"
        self._over(job, handle, reason, error, now_s())
        self._scheduler.drop(job)
        self._post(self._forget(id), Ended(error))

    def _clear(self, micro_batch: MicroBatch) -> None:
        """Whoever has come past where the workers died is not to blame for it."""
        running = self._scheduler.running
        for sid in (*micro_batch.decodes, *(chunk.sid for chunk in micro_batch.chunks)):
            job = running.get(sid)
            if job is not None and self._suspects.computed(job.id, job.computed):
                self._scheduler.admission.hold(self._suspects.held)

    def _over(
        self,
        job: Job,
        handle: Handle,
        reason: FinishReason | None,
        error: MnemocError | None,
        now_s: float,
    ) -> None:
        self._stats.ended(job, handle, reason, now_s)
        self.witness.ended(job, handle, reason, error)

    def _forget(self, id: int) -> Handle:
        if self._suspects.forget(id):
            self._scheduler.admission.hold(self._suspects.held)
        del self._jobs[id]
        return self._handles.pop(id)

    def _post(self, handle: Handle, event: Event) -> None:
        handle.record(event)
        self._outbox.append((handle, event))
