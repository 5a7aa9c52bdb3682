"""The scheduler's policy, with invented costs and no workers."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.artifact import ChunkRule, Layout, Memory, Optimality, Plan, Prediction, Stage
from mnemoc.runtime.cost import Load, PrefillTime
from mnemoc.runtime.growth import Growth
from mnemoc.runtime.scheduler import MicroBatch, Scheduler


class Rate:
    """A millisecond a row and a microsecond a query–key pair, in each of two stages."""

    def pace_s(self, load: Load) -> float:
        return load.T * 1e-3 + load.QK * 1e-6

    def crossing_s(self, load: Load) -> float:
        return 2 * self.pace_s(load)


PLAN = Plan(
    target="cpu",
    dtype="float32",
    layout=Layout(1, 2, 1),
    stages=(Stage("stage_0", 0, 1), Stage("stage_1", 1, 1)),
    chunks=(ChunkRule(0, 100, 50, 1, 0.0), ChunkRule(100, 1000, 20, 1, 0.0)),
    page_size=10,
    num_pages=100,
    stripe_tokens=1000,
    max_batch=4,
    max_rows=1024,
    predicted=Prediction(1.0, 1.0, 1.0, {}, {}),
    memory=Memory(0, 0, 0, 0, 0, 0, 0, ""),
    optimality=Optimality("gpus", 1.0, 1.0, 0.0),
    binding="none",
    alternatives=(),
)
ON_TWO_GROUPS = dataclasses.replace(PLAN, layout=Layout(1, 2, 2), stripe_tokens=100)
HELIX = dataclasses.replace(ON_TWO_GROUPS, layout=Layout(1, 2, 2, "helix"))


def make(plan: Plan = PLAN, tbt_s: float = 1.0) -> Scheduler:
    return Scheduler(plan, Rate(), context=1000, tbt_s=tbt_s)


def rows(micro_batch: MicroBatch | None) -> dict[int, int]:
    """Chunk rows by request."""
    return {chunk.id: chunk.rows for chunk in micro_batch.chunks} if micro_batch else {}


def test_a_prompt_goes_out_in_the_plans_chunks_without_waiting_for_answers() -> None:
    scheduler = make()
    scheduler.add(0, prompt=155, kv_tokens=160, now_s=0.0)
    sent = [rows(scheduler.next(0.0)) for _ in range(6)]
    assert sent == [{0: 50}, {0: 50}, {0: 20}, {0: 20}, {0: 15}, {}]


def test_a_decode_waits_for_its_token_and_goes_before_prefills() -> None:
    scheduler = make()
    scheduler.add(0, prompt=10, kv_tokens=20, now_s=0.0)
    first = scheduler.next(0.0)
    assert first is not None
    assert first.chunks[0].ends
    assert scheduler.next(0.0) is None
    scheduler.add(1, prompt=500, kv_tokens=500, now_s=0.0)
    scheduler.settled(first, going_on=[0])
    second = scheduler.next(0.0)
    assert second is not None
    assert (second.decodes, rows(second)) == ((0,), {1: 50})
    third = scheduler.next(0.0)
    assert third is not None
    assert third.decodes == ()


def test_at_most_max_batch_decode_together_and_the_others_come_next() -> None:
    scheduler = make()
    for id in range(6):
        scheduler.add(id, prompt=1, kv_tokens=10, now_s=0.0)
    first = scheduler.next(0.0)
    assert first is not None
    scheduler.settled(first, going_on=range(6))
    batches = [scheduler.next(0.0), scheduler.next(0.0)]
    assert [batch and batch.decodes for batch in batches] == [(0, 1, 2, 3), (4, 5)]


def test_only_one_long_prompt_is_in_a_batch_but_short_ones_join_it() -> None:
    scheduler = make()
    for id, prompt in enumerate((300, 310, 8, 9)):
        scheduler.add(id, prompt, prompt, now_s=0.0)
    sent = rows(scheduler.next(0.0))
    assert {2, 3} < sent.keys()
    assert len(sent.keys() & {0, 1}) == 1


def test_short_prompts_join_only_as_far_as_the_tbt_promise_allows() -> None:
    scheduler = make(tbt_s=0.15)  # room for about 75 rows over two stages
    for id, prompt in enumerate((300, 15, 15, 15)):
        scheduler.add(id, prompt, prompt, now_s=0.0)
    sent = rows(scheduler.next(0.0))
    assert sent == {0: 50, 1: 15}


def test_the_prompt_with_the_least_relative_slack_goes_first() -> None:
    scheduler = make(tbt_s=0.11)
    scheduler.add(0, prompt=400, kv_tokens=400, now_s=0.0)
    scheduler.add(1, prompt=45, kv_tokens=45, now_s=0.0)
    assert rows(scheduler.next(0.0)) == {0: 50}, "both have time: the long one's share is smaller"
    assert rows(scheduler.next(0.6)) == {1: 45}, "now the short one is late"


def test_groups_that_a_long_request_does_not_use_serve_short_ones_meanwhile() -> None:
    scheduler = make(ON_TWO_GROUPS, tbt_s=0.01)
    scheduler.add(0, prompt=90, kv_tokens=95, now_s=0.0)
    scheduler.add(1, prompt=40, kv_tokens=45, now_s=0.0)
    micro_batch = scheduler.next(0.0)
    assert rows(micro_batch) == {0: 50, 1: 40}
    assert micro_batch is not None
    assert micro_batch.groups == {0, 1}


def test_a_request_takes_on_its_next_group_in_the_middle_of_a_chunk() -> None:
    scheduler = make(ON_TWO_GROUPS)
    scheduler.add(0, prompt=150, kv_tokens=150, now_s=0.0)
    groups = []
    while micro_batch := scheduler.next(0.0):
        groups.append((micro_batch.chunks[0].start, micro_batch.groups))
    assert groups == [
        (0, {0}),
        (50, {0}),
        (100, {0, 1}),
        (120, {0, 1}),
        (140, {0, 1}),
    ]


def test_under_helix_every_group_takes_part_in_every_micro_batch() -> None:
    loads: list[Load] = []

    class Seen(Rate):
        def crossing_s(self, load: Load) -> float:
            loads.append(load)
            return super().crossing_s(load)

    scheduler = Scheduler(HELIX, Seen(), context=1000, tbt_s=1.0)
    scheduler.add(0, prompt=30, kv_tokens=30, now_s=0.0)
    scheduler.add(1, prompt=40, kv_tokens=40, now_s=0.0)
    micro_batch = scheduler.next(0.0)
    assert micro_batch is not None
    assert micro_batch.groups == {0, 1}
    assert rows(micro_batch) == {0: 30, 1: 40}
    assert [(load.T, load.X) for load in loads] == [(70, 70), (70, 70)]
    assert sorted(load.QK for load in loads) == [30 * 31 // 2, 40 * 41 // 2]
    assert [load.R for load in loads] == [1, 1]


def test_a_request_waits_until_all_its_pages_are_free_and_a_dropped_one_frees_them() -> None:
    scheduler = make()
    scheduler.add(0, prompt=600, kv_tokens=700, now_s=0.0)
    scheduler.add(1, prompt=400, kv_tokens=400, now_s=0.0)
    first = scheduler.next(0.0)
    assert first is not None
    assert (len(scheduler.running), len(scheduler.waiting)) == (1, 1)
    scheduler.drop(0)
    second = scheduler.next(0.0)
    assert second is not None
    assert rows(second) == {1: 50}
    assert [(change.id, change.job is None) for change in second.changes] == [(0, True), (1, False)]
    scheduler.settled(first, going_on=[0])  # what was in flight for it comes to nothing
    scheduler.drop(1)
    assert scheduler.next(0.0) is None
    assert scheduler.book.used_fraction == 0


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=10),
    st.sampled_from([PLAN, ON_TWO_GROUPS, HELIX]),
    st.integers(0, 2**32),
)
def test_every_request_finishes_in_order_and_leaves_nothing_behind(
    requests: list[tuple[int, int]], plan: Plan, seed: int
) -> None:
    """Up to two micro-batches in flight, requests arriving and being cancelled at random."""
    choose = random.Random(seed)
    scheduler = make(plan, tbt_s=0.1)
    arriving = dict(enumerate(requests))
    left = {id: new for id, (_, new) in arriving.items()}
    prefilled = dict.fromkeys(arriving, 0)
    flying: list[MicroBatch] = []
    now_s, idle = 0.0, 0
    while left:
        now_s += 0.01
        if arriving and choose.random() < 0.5:
            id, (prompt, new) = arriving.popitem()
            scheduler.add(id, prompt, prompt + new - 1, now_s)
        if choose.random() < 0.02:
            id = choose.choice(list(left))
            if id not in arriving:
                scheduler.drop(id)
                del left[id]
        micro_batch = scheduler.next(now_s) if len(flying) < 2 else None
        if micro_batch is not None:
            flying.append(micro_batch)
            assert len(micro_batch.decodes) <= plan.max_batch
            for chunk in micro_batch.chunks:
                assert chunk.start == prefilled[chunk.id]
                prefilled[chunk.id] += chunk.rows
                assert chunk.ends == (prefilled[chunk.id] == requests[chunk.id][0])
        idle = idle + 1 if not flying and not arriving else 0
        assert idle < 3, "requests are left, and nothing is done for them"
        if flying and (micro_batch is None or len(flying) == 2):
            land(scheduler, flying.pop(0), left)
    while flying:
        land(scheduler, flying.pop(0), left)
    assert scheduler.book.used_fraction == 0
    assert not scheduler.running
    assert scheduler.next(now_s) is None


def land(scheduler: Scheduler, micro_batch: MicroBatch, left: dict[int, int]) -> None:
    """The micro-batch is through: every request with a token wants the next, or is done."""
    tokens = [*micro_batch.decodes, *(chunk.id for chunk in micro_batch.chunks if chunk.ends)]
    going_on = []
    for id in tokens:
        if id not in left:
            continue
        left[id] -= 1
        if left[id]:
            going_on.append(id)
        else:
            scheduler.drop(id)
            del left[id]
    scheduler.settled(micro_batch, going_on)


def test_predicted_prefill_time_is_the_sum_over_the_plans_chunks() -> None:
    time = PrefillTime(PLAN, Rate(), Growth(1, 1000), context=200, points=1000)
    by_hand, n, sums = 0.0, 0, {}
    while n < 200:
        chunk = PLAN.chunk_at(n)
        by_hand += chunk * 1e-3 + (chunk * n + chunk * (chunk + 1) // 2) * 1e-6
        n += chunk
        sums[n] = by_hand
    for tokens, seconds in sums.items():
        assert time.until_s(tokens) == pytest.approx(seconds)
    assert time.until_s(25) == pytest.approx(25e-3 + 25 * 26 / 2 * 1e-6), "a chunk cut short"


def test_predicted_prefill_time_of_a_long_context_is_sampled_closely_enough() -> None:
    growth = Growth(1, 10**9)
    sampled = PrefillTime(PLAN, Rate(), growth, context=200_000)
    exact = PrefillTime(PLAN, Rate(), growth, context=200_000, points=200_000)
    for tokens in (1_000, 50_000, 123_456, 200_000):
        assert sampled.until_s(tokens) == pytest.approx(exact.until_s(tokens), rel=1e-3)
