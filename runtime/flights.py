"""Micro-batches in flight.

Has the scheduler's micro-batches carried out (`dispatch`), and has clients hear of what comes back
(`settle`). Who carries them out is behind one seam: workers, or a virtual clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..artifact import Manifest
from ..errors import MnemocError
from .blame import Blame
from .clients import Clients
from .protocol.messages import Done
from .request import Handle
from .scheduling.forecast import Forecast, Outlook, UnderWay
from .scheduling.job import Admitted, Job, MicroBatch
from .scheduling.scheduler import Scheduler
from .telemetry.snapshot import Look, take
from .telemetry.stats import Iteration, Stats
from .telemetry.tracing import Recorder


class Executor(Protocol):
    """Whoever carries out micro-batches, and says `Done` for each of their groups."""

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        """handles: the requests, by the sid of their admission."""
        ...


@dataclass(eq=False, slots=True)
class Flight:
    """A micro-batch on its way. groups: those that have not answered; going_on: sids that want a token.

    chunks: (request, rows) of its prompts
    """

    micro_batch: MicroBatch
    groups: set[int]
    chunks: tuple[tuple[int, int], ...] = ()
    going_on: list[int] = field(default_factory=list)
    busy_s: float = 0.0


class Flights:
    """The micro-batches that are on their way, and the requests that have pages, by sid.

    clients: of all requests that are not over
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
        self._blame = Blame(scheduler)
        self.clients = Clients(manifest, scheduler, stats, self._blame)
        self._depth, self._groups = manifest.plan.layout.spp, manifest.plan.layout.kvp
        self._live: dict[int, Handle] = {}
        self._flights: dict[int, Flight] = {}
        self._numbers = itertools.count()

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
        return sum(one.micro_batch.expected.crossing_s for one in self._flights.values())

    def accept(self, handles: Sequence[Handle], now_s: float) -> None:
        """New requests, of one moment. One forecast serves all of them, for it takes longer the more there
        are; but for strict promises: who is refused takes no time from those behind.
        """
        for strict, some in itertools.groupby(handles, lambda it: it.request.promise.strict):
            for alike in ([handle] for handle in some) if strict else (list(some),):
                self._accept(alike, now_s)

    def _accept(self, handles: Sequence[Handle], now_s: float) -> None:
        jobs = [self.clients.add(handle) for handle in handles]
        come = list(zip(handles, jobs, strict=True))
        if (forecast := self._forecast) is not None:
            outlook = self._outlook(forecast, now_s, until=jobs[0] if len(jobs) == 1 else None)
            come = [pair for pair in come if self._foretold(forecast, outlook, *pair, now_s)]
        for handle, job in come:
            self.clients.witness.came(job, handle)

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
                self._live[change.sid] = self.clients.admitted(change)
            elif isinstance(change, int):
                over.append(change)
        chunks = tuple([(self._live[chunk.sid].id, chunk.rows) for chunk in micro_batch.chunks])
        self._flights[number] = Flight(micro_batch, set(micro_batch.loads), chunks)
        if self._recorder is not None:
            self._recorder.sent(number, micro_batch, now_s)
        self._executor.send(number, micro_batch, self._live)
        for sid in over:
            self._live.pop(sid, None)
        if self._scheduler.filled:
            self.clients.name_pages()
        parts = self._stats.parts
        parts.schedule += chosen_s - began_s
        parts.dispatch += time.perf_counter() - chosen_s
        return True

    def settle(self, done: Done, now_s: float) -> None:
        """A group is through with a micro-batch."""
        if self._recorder is not None:
            self._recorder.done(done, now_s)
        flight = self._flights[done.number]
        flight.busy_s = max(flight.busy_s, done.busy_s)
        flight.groups.discard(done.group)
        flight.going_on += self.clients.note(done, now_s)
        if not flight.groups:
            self._landed(done.number, flight, now_s)

    def look(self, look: Look, now_s: float) -> None:
        """Answer somebody who wants to see what is going on."""
        outlook = None
        if self._forecast is not None and (look.most or look.wanted):
            outlook = self._outlook(self._forecast, now_s)
        known = self.clients.jobs, self.clients.handles, self._scheduler, self._stats
        look.answer(take(look, *known, outlook, now_s))

    def replay(self, error: MnemocError) -> bool:
        """The workers are gone: forget what is in flight; whoever ran is to go on where it stopped.

        But for a request whose fault it must be: that one fails. Returns whether there was one.
        """
        on_their_way = [flight.micro_batch for flight in self._flights.values()]
        guilty = self._blame.died(on_their_way, error)
        self._scheduler.restart()
        self._flights.clear()
        self._live.clear()
        if self._recorder is not None:
            self._recorder.lost()
        if guilty is not None:
            self.clients.end(*guilty)
        return guilty is not None

    def _landed(self, number: int, flight: Flight, now_s: float) -> None:
        del self._flights[number]
        micro_batch, expected = flight.micro_batch, flight.micro_batch.expected
        if self._forecast is not None:
            self._forecast.landed(micro_batch.loads, expected, now_s)
        self._scheduler.settled(micro_batch, flight.going_on, now_s)
        self._blame.landed(micro_batch)
        self._stats.landed(
            micro_batch,
            Iteration(
                len(micro_batch.decodes),
                sum([chunk.rows for chunk in micro_batch.chunks]),
                now_s - expected.sent_s,
                flight.busy_s,
                expected.through_s - expected.sent_s,
                flight.chunks,
            ),
        )
        self.clients.progress(micro_batch.chunks, now_s)

    def _outlook(self, forecast: Forecast, now_s: float, until: Job | None = None) -> Outlook:
        """When first tokens will come; until: as in `Forecast.look`."""
        flights = self._flights.values()
        under_way = [UnderWay(one.groups, one.micro_batch.expected) for one in flights]
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
        self.clients.refuse(job, refusal)
        return False
