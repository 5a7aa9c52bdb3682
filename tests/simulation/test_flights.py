"""What flights tell the page book of: names for pages that are filled token by token."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from mnemoc.runtime.flights import Flights
from mnemoc.runtime.protocol.messages import Done
from mnemoc.runtime.request import Handle, Request, Sampling
from mnemoc.runtime.scheduling.cost import PlanCost
from mnemoc.runtime.scheduling.forecast import Forecast
from mnemoc.runtime.scheduling.job import MicroBatch
from mnemoc.runtime.scheduling.prefix import page_hashes
from mnemoc.runtime.scheduling.scheduler import Scheduler
from mnemoc.runtime.telemetry.snapshot import Look, Snapshot
from mnemoc.runtime.telemetry.stats import Stats

from .conftest import make_cost, make_manifest

PAGE_SIZE = 16


class Counting:
    """Carries out a micro-batch at once: token after token a request counts up from its id."""

    def __init__(self) -> None:
        self.done: Done | None = None

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        sids = [*micro_batch.decodes, *(chunk.sid for chunk in micro_batch.chunks if chunk.ends)]
        tokens = [(sid, 1000 * handles[sid].id + len(handles[sid].tokens)) for sid in sids]
        self.done = Done(number, 0, tokens, (), 0.0)


@pytest.mark.parametrize("longer", range(PAGE_SIZE))
def test_pages_are_named_by_their_tokens_whenever_their_request_was_preempted(longer: int) -> None:
    """Two requests grow until one gives way, at any place in a page, and goes on later."""
    manifest = make_manifest(spp=1, num_pages=14)
    assert manifest.plan.page_size == PAGE_SIZE
    scheduler = Scheduler(manifest.plan, PlanCost(make_cost(1)), manifest.workload)
    executor, stats = Counting(), Stats()
    flights = Flights(manifest, scheduler, executor, stats)
    handles = []
    for id in range(2):
        request = Request(range(id, 40 + id + id * longer), 90, Sampling(ignore_eos=True))
        hashes = page_hashes(request.prompt_ids, PAGE_SIZE)
        handles.append(Handle(request, id, 0.01 * id, lambda id: None, None, 0, hashes))
        flights.accept([handles[id]], 0.01 * id)
    now_s = 0.1
    while stats.finished < 2:
        now_s += 0.01
        assert flights.dispatch(now_s) and executor.done is not None
        flights.settle(executor.done, now_s)
        for job in scheduler.running.values():
            known = [*handles[job.id].request.prompt_ids, *handles[job.id].tokens]
            assert job.hashes is not None
            assert job.hashes == page_hashes(known, PAGE_SIZE)[: len(job.hashes)]
    assert scheduler.counts.preemptions
    assert stats.prefix_queries == sum(len(handle.request.prompt_ids) for handle in handles)
    assert stats.prefix_hits == 0, "what is found again after a preemption is no hit"


def test_a_look_at_a_thousand_requests_holds_the_engine_up_for_milliseconds() -> None:
    manifest = make_manifest(spp=1)
    cost = PlanCost(make_cost(1))
    scheduler = Scheduler(manifest.plan, cost, manifest.workload)
    executor, forecast = Counting(), Forecast(scheduler, cost)
    flights = Flights(manifest, scheduler, executor, Stats(), forecast=forecast)
    for id in range(1000):
        request = Request(range(20), 500, Sampling(ignore_eos=True))
        flights.accept([Handle(request, id, 0.001 * id, lambda id: None, None, 0)], 0.001 * id)
    while flights.dispatch(1.0) and len(scheduler.running) < 500:
        assert executor.done is not None
        flights.settle(executor.done, 1.0)
    seen: list[Snapshot] = []
    began_s = time.thread_time()
    for _ in range(10):
        flights.look(Look(seen.append, most=40), 1.5)
    each_s = (time.thread_time() - began_s) / 10
    assert sum(seen[0].counts.values()) == 1000 and len(seen[0].requests) == 40
    assert each_s < 0.05


def test_who_is_cancelled_before_its_group_has_room_was_never_there() -> None:
    """It has its pages, but its group is busy; the next micro-batch is to know nothing of it."""
    manifest = make_manifest(spp=1, kvp=2)
    scheduler = Scheduler(manifest.plan, PlanCost(make_cost(1)), manifest.workload)
    executor = Counting()
    flights = Flights(manifest, scheduler, executor, Stats())

    def ask(id: int) -> None:
        prompt = tuple(range(40))
        hashes = page_hashes(prompt, PAGE_SIZE)
        request = Request(prompt, 9, Sampling(ignore_eos=True))
        flights.accept([Handle(request, id, 0.0, lambda id: None, None, 0, hashes)], 0.0)

    def settle() -> None:
        assert executor.done is not None
        flights.settle(executor.done, 0.0)

    ask(0)
    assert flights.dispatch(0.0)
    settle()
    assert flights.dispatch(0.0), "it decodes"
    ask(1)
    assert not flights.dispatch(0.0), "it would go where its prefix is"
    assert len(scheduler.running) == 2
    flights.clients.cancel(1)
    settle()
    assert flights.dispatch(0.0)
    settle()
    assert list(flights.clients.handles) == [0]
