"""The timeline is the pipeline's recurrence over the very chunks that the scheduler cuts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mnemoc import pipeline
from mnemoc.artifact import Workload
from mnemoc.planner.timeline import _pipeline, make_timeline

times = st.tuples(st.integers(1, 5), st.integers(1, 20)).flatmap(
    lambda shape: arrays(float, shape, elements=st.floats(0.01, 10))
)


@given(times, st.sampled_from([0.0, 0.5, 8.0]))
def test_chunks_wait_for_the_stage_and_link_before_and_for_the_chunk_before(seconds, hop):
    begins, ends = _pipeline(seconds, np.full(seconds.shape[1], hop))
    for stage, row in enumerate(seconds):
        linked = 0.0
        for chunk, took in enumerate(row):
            if stage:
                linked = max(linked, ends[stage - 1, chunk]) + hop
            left = linked if stage else 0.0
            free = ends[stage, chunk - 1] if chunk else 0.0
            assert ends[stage, chunk] == pytest.approx(max(left, free) + took)
            assert begins[stage, chunk] == pytest.approx(max(left, free))


@pytest.fixture(scope="module", params=[1, 3])
def planned(request):
    workload = Workload(context=300_000, ttft_s=60.0, tbt_s=0.1, concurrency=request.param)
    pinned = {"tp": 8, "spp": 4, "kvp": 2}
    return pipeline.plan("llama-3-8b", "dgx-h100", workload, pinned=pinned)


def test_a_timeline_ends_within_the_predicted_ttft(planned):
    made = make_timeline(planned.plan, planned.workload, planned.formulas)
    predicted = planned.plan.predicted.ttft_s
    assert 0.9 * predicted <= made.end_s <= predicted * (1 + 1e-6)


def test_sampled_chunks_are_those_of_the_rules_and_cost_what_the_rules_say(planned):
    made = make_timeline(planned.plan, planned.workload, planned.formulas)
    first, last = made.iterations[0], made.iterations[-1]
    assert (first.number, first.start) == (1, 0)
    assert (last.number, last.end) == (made.num_chunks, planned.workload.context)
    for sampled in made.iterations[:-1]:
        assert sampled.tokens == planned.plan.chunk_at(sampled.start)
    rules = {rule.end: rule for rule in planned.plan.chunks}
    whole = [i for i in made.iterations if i.end in rules and i.tokens == rules[i.end].chunk]
    assert len(whole) >= 2
    for sampled in whole:
        assert sampled.seconds == pytest.approx(rules[sampled.end].iteration_s)


def test_slots_are_of_every_stage_and_in_order(planned):
    made = make_timeline(planned.plan, planned.workload, planned.formulas)
    for slots in (made.filling, made.draining):
        assert {slot.stage for slot in slots} == set(range(4))
        assert all(slot.begin_s < slot.end_s for slot in slots)
    assert made.filling[0].begin_s == 0
    assert made.draining[-1].end_s == pytest.approx(made.end_s)
    assert np.ptp([slot.number for slot in made.draining]) == np.ptp(
        [slot.number for slot in made.filling]
    )
