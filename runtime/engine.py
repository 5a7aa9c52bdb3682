"""The engine: `step()` = schedule, dispatch, settle, in a thread of its own. No torch.

    with Engine.start(directory, weights) as engine:
        for token in engine.submit(Request(prompt_ids, max_tokens=32)):
            print(token.id)

Requests come in from any thread; the engine's thread alone touches the scheduler and the workers.
When workers die or hang, fresh ones are started, and requests that were running go on where they stopped
(`recovery`).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

from ..artifact import Manifest, Plan
from ..errors import BadInput, MnemocError, RuntimeFault
from ..folder import load_artifact
from . import collector
from .dispatch import Dispatch
from .executor.launcher import Launcher
from .executor.workers import Up, Workers
from .flights import Flights
from .inbox import Inbox
from .loader import ArtifactModules
from .protocol.messages import Done
from .rank.weights import Checkpoint
from .recovery import STEP_TIMEOUT_S, Recovery
from .request import Ended, Event, Handle, Prepared, Request, Sampling, now_s
from .scheduling.cost import PlanCost
from .scheduling.forecast import Forecast
from .scheduling.growth import Growth
from .scheduling.limits import Limits
from .scheduling.packing import Packing
from .scheduling.policies import DEFAULT, POLICIES
from .scheduling.prefix import page_hashes
from .scheduling.scheduler import Counts, Scheduler
from .telemetry.snapshot import GroupPages, Look, pages
from .telemetry.stats import Stats
from .telemetry.tracing import Recorder
from .telemetry.witness import Witness

WARM_UP_TOKENS = 64

log = logging.getLogger("mnemoc")


class Engine:
    """A running plan. Make it with `Engine.start`; close it, or use it as a context manager."""

    def __init__(
        self,
        manifest: Manifest,
        scheduler: Scheduler,
        workers: Workers,
        prefix_caching: bool,
        forecast: Forecast,
        recorder: Recorder | None = None,
        step_timeout_s: float = STEP_TIMEOUT_S,
    ) -> None:
        self.manifest = manifest
        self._recorder = recorder
        self._prefix_caching = prefix_caching
        self.vocab = int(manifest.model["vocab"])
        self._limits = Limits.of(manifest)
        self.stats = Stats()
        self._scheduler = scheduler
        self._forecast = forecast
        self._workers = workers
        self._flights = Flights(
            manifest, scheduler, Dispatch(workers.send), self.stats, recorder, forecast
        )
        self._recovery = Recovery(manifest, self._flights, workers, step_timeout_s)
        self._witness = self._flights.clients.witness
        self._inbox = Inbox(workers.wake)
        self._ids = itertools.count()
        self._warm = False
        self._closing: MnemocError | None = None
        self._thread = threading.Thread(target=self._run, name="mnemoc-engine", daemon=True)

    @classmethod
    def start(
        cls,
        directory: Path,
        weights: Path,
        *,
        progress: Callable[[str], None] | None = None,
        nursery: Launcher | None = None,
        policy: str = DEFAULT.name,
        packing: Callable[[Plan, Growth], Packing] | None = None,
        prefix_caching: bool = True,
        trace_out: Path | None = None,
        step_timeout_s: float = STEP_TIMEOUT_S,
    ) -> Engine:
        """Verify the artifact, start the workers, load the weights, warm up; returns when all is ready.

        nursery: where workers come from, `Outside` or a process that forks them, for one engine after
            another; without one, such a process is made.
        policy: whose prompt goes first, one of `policies.POLICIES`
        packing: another way to fill micro-batches than our own (`packing.Adaptive`), for comparison
        prefix_caching: whether requests share the pages of a common prefix
        trace_out: a file that gets what the engine did, for Perfetto, when it is closed
        step_timeout_s: a step that takes longer, and far longer than predicted, hangs: workers are replaced
        Workers that others start again (`Launcher.tended`) are waited for when one dies; progress hears why.
        Raises BadInput for a plan or weights that do not fit, RuntimeFault if workers cannot start.
        """
        say = progress or (lambda message: None)
        manifest, contents = load_artifact(Path(directory))
        Checkpoint.open(Path(weights))
        plan = manifest.plan
        cost = PlanCost(ArtifactModules(Path(directory), contents, ["cost.py"]).load("cost"))
        scheduler = Scheduler(
            plan,
            cost,
            manifest.workload,
            POLICIES[policy],
            packing and packing(plan, Growth.of(plan)),
        )
        recorder = None
        workers = Workers(Path(directory), Path(weights), plan.gpus, nursery)
        begin = "waiting for" if workers.tended else "starting"
        say(f"{begin} {plan.gpus} worker{'s' if plan.gpus > 1 else ''}")
        try:
            if trace_out is not None:
                recorder = Recorder.open(trace_out, plan.layout, now_s(), log.warning)
            forecast = Forecast(scheduler, cost)
            engine = cls(
                manifest, scheduler, workers, prefix_caching, forecast, recorder, step_timeout_s
            )
            engine.watched_by(_Start(say))
            say("loading weights")
            workers.spawn()
            while not workers.up:
                engine.step()
        except BaseException:
            workers.close()
            if recorder is not None:
                recorder.close(keep=False)
            raise
        engine._thread.start()
        try:
            say("warming up")
            engine._warm_up()
            engine.watched_by(Witness())
        except BaseException:
            engine.close()
            raise
        collector.keep_out()
        return engine

    def prepare(self, request: Request) -> Prepared:
        """The part of `submit` that looks at every token of the prompt. From any thread.

        Raises BadInput for a request that can never be served.
        """
        why = self._limits.refusal(len(request.prompt_ids), request.max_tokens)
        if why is not None:
            raise why
        request.check_ids(self.vocab)
        if request.sampling.temperature > 0 and request.sampling.seed is None:
            seeded = dataclasses.replace(request.sampling, seed=secrets.randbits(62))
            request = dataclasses.replace(request, sampling=seeded)
        hashes = None
        if self._prefix_caching and request.logits in ("none", "last"):  # a hit has no logits
            hashes = page_hashes(request.prompt_ids, self.manifest.plan.page_size)
        return Prepared(request, hashes)

    def submit(
        self, request: Request | Prepared, sink: Callable[[Event], None] | None = None
    ) -> Handle:
        """Queue a request. From any thread.

        sink: called with each event in the engine's thread, instead of the handle's own queue.
        Raises BadInput for a request that can never be served, RuntimeFault if the engine is down.
        """
        ready = request if isinstance(request, Prepared) else self.prepare(request)
        handle = Handle(
            ready.request, next(self._ids), now_s(), self._inbox.put, sink, self.vocab, ready.hashes
        )
        if not self._inbox.put(handle):
            raise cast(MnemocError, self._inbox.closed)
        return handle

    @property
    def healthy(self) -> bool:
        """Whether the workers are up and the engine's loop runs."""
        return self._workers.up and self._inbox.closed is None

    @property
    def failure(self) -> MnemocError | None:
        """Why the engine has ended, if it has."""
        return self._inbox.closed

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def counts(self) -> Counts:
        """Preemptions, prefix hits, growths, since the start."""
        return self._scheduler.counts

    @property
    def swapped(self) -> tuple[int, int]:
        """KV pages copied to host memory, and back, since the start: of each rank that has them."""
        book = self._scheduler.book
        return book.swapped_out, book.swapped_in

    @property
    def kv_used_fraction(self) -> float:
        """Of all KV pages, those that requests hold."""
        return self._scheduler.book.used_fraction

    @property
    def kv_pages(self) -> tuple[GroupPages, ...]:
        """Of each KVP group."""
        return pages(self._scheduler)

    def look(self, look: Look) -> bool:
        """Have a snapshot taken, soon, by the engine's thread; False if that has ended. From any thread."""
        return self._inbox.put(look)

    def watched_by(self, witness: Witness) -> None:
        """Tell it of all that happens from now on, in the engine's thread."""
        self._witness = self._flights.clients.witness = witness

    def close(self, why: str = "the engine was closed") -> None:
        """End all requests and all workers. May be called twice. why: those that are not through yet"""
        self._inbox.put(RuntimeFault(why))
        self._thread.join()
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def step(self, wait_s: float | None = None) -> None:
        """Schedule, dispatch, settle: fill the pipeline, then wait for what comes back."""
        while self._workers.up and self._flights.dispatch(now_s()):
            pass
        self._flights.clients.deliver()
        events = self._workers.poll(wait_s)
        woke_s = now_s()
        for event in events:
            if isinstance(event, Done):
                self._recovery.stepped()
                self._flights.settle(event, now_s())
            elif isinstance(event, Up):
                self.stats.restarts += 1
                self._recovery.ready()
                self._witness.back()
            elif self._hopeless(event.error):
                raise event.error
            else:
                self.stats.deaths += 1
                self._witness.lost(event.error)
                self._recovery.restart(event.error)
        self._recovery.look()
        self.stats.parts.settle += now_s() - woke_s

    def _hopeless(self, error: MnemocError) -> bool:
        """At the start: nobody starts the workers again, or it will be so each time."""
        return not self._warm and (not self._workers.tended or isinstance(error, BadInput))

    def _warm_up(self) -> None:
        """Run something small on every KVP group: first steps compile and allocate, and are slow."""
        length = min(WARM_UP_TOKENS, self.manifest.workload.context)
        sampling = Sampling(ignore_eos=True)
        groups = range(self.manifest.plan.layout.kvp)
        requests = [Request((group % self.vocab,) * length, 2, sampling) for group in groups]
        if self._limits.refusal(length, requests[0].max_tokens) is None:
            for handle in [self.submit(request) for request in requests]:
                handle.result()
        self.stats.clear()
        self._warm = True
        self._forecast.forget()

    def _run(self) -> None:
        try:
            while self._closing is None:
                self.step()
                self._read_inbox()
            error = self._closing
        except MnemocError as fault:
            error = fault
        except Exception as bug:
            error = RuntimeFault(f"the engine failed: {type(bug).__name__}: {bug}")
            error.__cause__ = bug
        finally:
            self._inbox.close(error)
            self._turn_away(error)
            self._workers.close()

    def _read_inbox(self) -> None:
        for message in self._inbox.read():
            if isinstance(message, list):
                self._flights.accept(message, now_s())
            elif isinstance(message, MnemocError):
                self._closing = message
            elif isinstance(message, int):
                self._flights.clients.cancel(message)
            else:
                self._flights.look(message, now_s())

    def _turn_away(self, error: MnemocError) -> None:
        """Nobody may wait for an engine that has ended: who was there, and who has just come."""
        self._flights.clients.fail_all(error)
        self._flights.clients.deliver()
        for message in self._inbox.rest():
            if isinstance(message, Look):
                self._flights.look(message, now_s())
            elif isinstance(message, Handle) and message.finish_reason is None:
                ended = Ended(error)
                message.record(ended)
                message.hand_over(ended)


class _Start(Witness):
    """Until an engine has started, whoever waits for it is told why that takes long."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def lost(self, error: MnemocError) -> None:
        self._say(f"{error}; waiting until all workers are there again")
