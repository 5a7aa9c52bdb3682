"""What the forecast says of requests, against what the same scheduler then does on a virtual clock."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Manifest
from mnemoc.errors import BadInput
from mnemoc.runtime.flights import Flights
from mnemoc.runtime.request import Handle, Promise, Request, Sampling, TooLate
from mnemoc.runtime.scheduling.cost import PlanCost
from mnemoc.runtime.scheduling.fluid import MOST_PROMPTS
from mnemoc.runtime.scheduling.forecast import MOST_AT_ONCE, Drift, Forecast
from mnemoc.runtime.scheduling.job import MicroBatch
from mnemoc.runtime.scheduling.policies import POLICIES
from mnemoc.runtime.scheduling.scheduler import Scheduler
from mnemoc.runtime.simulation import Arrival, Asked, Limits, Simulation, load_workload, survey
from mnemoc.runtime.telemetry.stats import Stats

from .conftest import make_cost, make_manifest
from .test_simulation import Listed


def foretold(
    requests: Iterable[Arrival], manifest: Manifest, cost: Any = None, policy: str = "lars-slack"
) -> list[Handle]:
    """The requests as they ended, each with what was predicted of it."""
    traffic, ended = Listed(tuple(requests)), []
    surveyed = survey(traffic, Limits.of(manifest), skip=True)
    cost = cost or make_cost(manifest.plan.layout.spp)
    asked = Asked(policy)
    Simulation(manifest, cost, traffic, surveyed, asked, on_end=ended.append).run()
    return sorted(ended, key=lambda handle: handle.id)


def errors(handles: Iterable[Handle]) -> Iterator[float]:
    for handle in handles:
        assert handle.predicted_ttft_s is not None and handle.ttft_s is not None
        yield handle.predicted_ttft_s / handle.ttft_s - 1


@pytest.mark.parametrize("spp", [1, 2])
@pytest.mark.parametrize("prompt", [1, 99, 1000, 19_000])
def test_alone_a_prompt_comes_as_predicted(prompt: int, spp: int) -> None:
    (handle,) = foretold([Arrival(0.0, prompt, 3)], make_manifest(spp=spp))
    assert next(errors([handle])) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("kvp", [1, 2])
@pytest.mark.parametrize("policy", ["lars-slack", "fcfs"])
def test_among_others_a_prompt_comes_about_as_predicted(policy: str, kvp: int) -> None:
    """Conversations, and now and then a long prompt."""
    arrivals = load_workload("sharegpt").at(1.0).arrivals()
    requests = [
        dataclasses.replace(one, prompt=18_000) if i % 25 == 0 else one
        for i, one in enumerate(itertools.takewhile(lambda one: one.time_s < 30, arrivals))
    ]
    manifest = make_manifest(kvp=kvp, num_pages=12_000)
    found = [abs(error) for error in errors(foretold(requests, manifest, policy=policy))]
    assert statistics.median(found) < 0.2
    assert statistics.quantiles(found, n=10)[-1] < 0.7


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 0.5), st.integers(1, 20_000), st.integers(1, 60)),
    min_size=1,
    max_size=48,
)


@given(
    ARRIVALS,
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([(1, "repeated"), (2, "repeated"), (2, "helix")]),
    st.sampled_from([1300, 3000]),
)
@settings(max_examples=40)
def test_whatever_comes_each_request_has_a_forecast(
    came: list[tuple[float, int, int]], policy: str, groups: tuple[int, str], num_pages: int
) -> None:
    """Also where dozens wait, for time and for pages: all of them get their tokens as without a forecast."""
    requests = [Arrival(*one) for one in sorted(came)]
    kvp, ffn = groups
    handles = foretold(
        requests, make_manifest(kvp=kvp, ffn=ffn, num_pages=num_pages), policy=policy
    )
    assert len(handles) == len(requests)
    for handle in handles:
        assert handle.predicted_ttft_s is not None
        assert 0 < handle.predicted_ttft_s < math.inf


def test_the_last_of_a_long_queue_is_told_so() -> None:
    requests = [Arrival(0.0, 1000, 2) for _ in range(2 * MOST_PROMPTS)]
    handles = foretold(requests, make_manifest(num_pages=100), policy="fcfs")
    predicted = [handle.predicted_ttft_s for handle in handles]
    assert predicted == sorted(predicted, key=lambda seconds: seconds or 0.0)
    assert next(errors(handles[-1:])) == pytest.approx(0, abs=0.25)


def test_who_waits_for_pages_is_told_when_they_will_be_free() -> None:
    """The first takes all pages, until its last token."""
    manifest = make_manifest(spp=1, num_pages=40)
    requests = [Arrival(0.0, 400, 220), Arrival(0.5, 300, 5)]
    first, second = foretold(requests, manifest, make_cost(1))
    assert second.ttft_s is not None and second.scheduled_s is not None
    assert second.scheduled_s >= first.token_times_s[-1], "it waited"
    assert next(errors([second])) == pytest.approx(0, abs=0.2)


def test_a_prompt_that_is_found_in_pages_is_predicted_to_come_sooner() -> None:
    blocks = tuple(range(8))
    alike = [Arrival(float(i), 4000, 2, blocks=blocks, block_tokens=500) for i in range(2)]
    first, second = foretold(alike, make_manifest())
    assert first.predicted_ttft_s is not None and second.predicted_ttft_s is not None
    assert second.predicted_ttft_s < first.predicted_ttft_s / 10
    assert next(errors([second])) == pytest.approx(0, abs=0.3)


class Nobody:
    """An executor that never answers."""

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None: ...


def test_a_strict_promise_that_cannot_be_kept_is_refused_and_leaves_nothing_behind() -> None:
    manifest, cost = make_manifest(spp=1), PlanCost(make_cost(1))
    scheduler = Scheduler(manifest.plan, cost, manifest.workload, POLICIES["fcfs"])
    stats, forecast = Stats(), Forecast(scheduler, cost)
    flights = Flights(manifest, scheduler, Nobody(), stats, forecast=forecast)
    alone_s = scheduler.prefill_time.until_s(15_000)

    def came(id: int, ttft_s: float, strict: bool, tbt_s: float | None = None) -> Handle:
        promise = Promise(ttft_s, tbt_s, strict=strict)
        request = Request(range(15_000), 3, Sampling(), promise=promise)
        handle = Handle(request, id, 0.0, lambda id: None, None, 0)
        flights.accept([handle], 0.0)
        return handle

    assert came(0, 1.1 * alone_s, strict=True).error is None, "the engine is idle"
    for id in (1, 2):
        assert came(id, 0.1, strict=False).error is None, "who is not strict waits"
    refused = came(3, 2 * alone_s, strict=True)
    assert isinstance(refused.error, TooLate)
    assert refused.error.predicted_s == pytest.approx(4 * alone_s, rel=0.1)
    assert refused.error.retry_s == refused.error.predicted_s - 2 * alone_s
    never = came(4, 0.5 * alone_s, strict=True)
    assert isinstance(never.error, BadInput)
    assert "the prompt alone takes" in str(never.error)
    token_s = scheduler.token_s(scheduler.waiting[0])
    hasty = came(5, 9 * alone_s, strict=True, tbt_s=0.9 * token_s)
    assert isinstance(hasty.error, BadInput)
    assert "tokens cannot come every" in str(hasty.error)
    assert set(scheduler.waiting) == {0, 1, 2}
    assert stats.refused == 3
    assert came(6, 4.5 * alone_s, strict=True, tbt_s=1.1 * token_s).error is None


def test_drift_follows_the_machine_and_not_a_single_stall() -> None:
    drift = Drift()
    for _ in range(400):
        drift.saw(0.03, 0.045)
    assert drift.ratio == pytest.approx(1.5, rel=0.02)
    drift.saw(0.03, 60.0)
    assert drift.ratio < 1.5 * (1 + MOST_AT_ONCE * 0.03)
    for _ in range(400):
        drift.saw(0.03, 0.03)
    assert drift.ratio == pytest.approx(1.0, rel=0.1)
