"""The scheduler's policy, with invented costs and no workers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from mnemoc.artifact import ChunkRule, Memory, Optimality, Plan, Prediction, Stage, Workload
from mnemoc.layout import Layout
from mnemoc.runtime.request import Promise
from mnemoc.runtime.scheduling.cost import Load, PrefillTime
from mnemoc.runtime.scheduling.growth import Growth
from mnemoc.runtime.scheduling.job import Admitted, Job, MicroBatch
from mnemoc.runtime.scheduling.overrun import LEAST
from mnemoc.runtime.scheduling.policies import POLICIES
from mnemoc.runtime.scheduling.prefix import page_hashes
from mnemoc.runtime.scheduling.scheduler import Scheduler


class Rate:
    """A millisecond a row and a microsecond a query–key pair, in each of two stages."""

    def pace_s(self, load: Load) -> float:
        return load.T * 1e-3 + load.QK * 1e-6

    def crossing_s(self, load: Load) -> float:
        return 2 * self.pace_s(load)

    def swap_s(self, pages: int) -> float:
        return math.inf


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
    max_rows=54,
    predicted=Prediction(1.0, 1.0, 1.0, {}, {}),
    memory=Memory(0, 0, 0, 0, 0, 0, 0, ""),
    optimality=Optimality("gpus", 1.0, 1.0, 0.0),
    binding="none",
    alternatives=(),
)
ON_TWO_GROUPS = dataclasses.replace(PLAN, layout=Layout(1, 2, 2), stripe_tokens=100)
HELIX = dataclasses.replace(ON_TWO_GROUPS, layout=Layout(1, 2, 2, "helix"))


def make(
    plan: Plan = PLAN, tbt_s: float = 1.0, policy: str = "lars", ttft_s: float = 100.0
) -> Scheduler:
    """As it is after a while: it has seen micro-batches take what was predicted."""
    scheduler = Scheduler(plan, Rate(), Workload(1000, ttft_s, tbt_s), POLICIES[policy])
    scheduler.overrun.ratio = LEAST
    return scheduler


def step(scheduler: Scheduler, now_s: float = 0.0) -> MicroBatch:
    """A micro-batch that must be there."""
    micro_batch = scheduler.next(now_s)
    assert micro_batch is not None
    return micro_batch


def rows(scheduler: Scheduler, now_s: float = 0.0) -> dict[int, int]:
    """The next micro-batch's chunk rows, by request."""
    micro_batch = scheduler.next(now_s)
    chunks = micro_batch.chunks if micro_batch else ()
    return {scheduler.running[chunk.sid].id: chunk.rows for chunk in chunks}


def decode(
    scheduler: Scheduler, prompts: Sequence[int], new: int = 10, first: int = 100
) -> list[Job]:
    """Requests that have their first token, and wait for the next."""
    jobs = [scheduler.add(first + i, n, n + new - 1, 0.0) for i, n in enumerate(prompts)]
    while any(job.processed < job.prompt for job in jobs):
        sent = []
        while micro_batch := scheduler.next(0.0):
            sent.append(micro_batch)
        for micro_batch in sent:
            going_on = [chunk.sid for chunk in micro_batch.chunks if chunk.ends]
            for job in jobs:
                if job.sid in going_on:
                    job.tokens, job.first_token_s = 1, 0.0
            scheduler.settled(micro_batch, [*micro_batch.decodes, *going_on])
    return jobs


def test_a_prompt_goes_out_in_the_plans_chunks_without_waiting_for_answers() -> None:
    scheduler = make()
    scheduler.add(0, prompt=155, kv_tokens=160, now_s=0.0)
    sent = [rows(scheduler) for _ in range(6)]
    assert sent == [{0: 50}, {0: 50}, {0: 20}, {0: 20}, {0: 15}, {}]


def test_a_decode_waits_for_its_token_and_goes_before_prefills() -> None:
    scheduler = make()
    scheduler.add(0, prompt=10, kv_tokens=20, now_s=0.0)
    first = step(scheduler)
    assert first.chunks[0].ends
    assert scheduler.next(0.0) is None
    scheduler.add(1, prompt=500, kv_tokens=500, now_s=0.0)
    scheduler.settled(first, going_on=[0])
    second = step(scheduler)
    assert second.decodes == (0,)
    assert [chunk.sid for chunk in second.chunks] == [1]
    assert step(scheduler).decodes == ()


def test_at_most_max_batch_decode_together_and_the_others_come_next() -> None:
    scheduler = make()
    decode(scheduler, [1] * 3)
    decode(scheduler, [1] * 3, first=103)
    assert [len(step(scheduler).decodes) for _ in range(2)] == [4, 2]


@pytest.mark.parametrize("policy", POLICIES)
def test_only_one_long_prompt_is_in_a_batch_but_short_ones_join_it(policy: str) -> None:
    """There is time for all of them, and memory for 54 rows."""
    scheduler = make(policy=policy)
    long = [scheduler.add(id, 10 + id, 20, now_s=0.0) for id in (0, 1)]
    for job in long:
        job.long = True
    for id in (2, 3):
        scheduler.add(id, 3, 3, now_s=0.0)
    sent = rows(scheduler)
    assert {2, 3} < sent.keys()
    assert len(sent.keys() & {0, 1}) == 1


@pytest.mark.parametrize("decodes", [1, 3])
def test_beside_decodes_a_chunk_is_as_large_as_their_promise_allows(decodes: int) -> None:
    scheduler = make(tbt_s=0.085)
    decode(scheduler, [5] * decodes)
    scheduler.add(0, prompt=900, kv_tokens=900, now_s=0.0)
    micro_batch = step(scheduler)
    (load,) = micro_batch.loads.values()
    assert load.T - decodes == 32, (
        "eighths of powers of two, in steps of 16: 48 would take too long"
    )
    assert 2 * (load.T * 1e-3 + load.QK * 1e-6) <= 0.085


def test_a_request_may_promise_its_client_more_than_the_plan_does() -> None:
    scheduler = make(tbt_s=10.0)
    decode(scheduler, [5])
    scheduler.running[0].tbt_s = 0.05
    scheduler.add(0, prompt=900, kv_tokens=900, now_s=0.0)
    assert rows(scheduler) == {0: 16}


@pytest.mark.parametrize(("tbt_s", "together"), [(0.07, 2), (1.0, 3)])
def test_short_prompts_share_a_micro_batch_as_far_as_promise_and_memory_go(
    tbt_s: float, together: int
) -> None:
    """30 rows take about 60 ms in two stages; the plan has memory for 54."""
    scheduler = make(tbt_s=tbt_s)
    for id in range(4):
        scheduler.add(id, 15, 15, now_s=0.0)
    assert list(rows(scheduler).values()) == [15] * together


@pytest.mark.parametrize(
    ("policy", "ttft_s", "short_first"),
    [("lars", 2.0, False), ("lars-slack", 2.0, True), ("lars-slack", 0.01, True)],
)
def test_short_prompts_need_not_wait_behind_a_long_one_late_or_not(
    policy: str, ttft_s: float, short_first: bool
) -> None:
    """The short one has much time; in order of slack the long one comes first, and takes all there is."""
    scheduler = make(tbt_s=0.2, policy=policy)
    decode(scheduler, [1])
    scheduler.running[0].first_token_s = 1.0
    long = scheduler.add(0, 900, 900, now_s=0.0, promise=Promise(ttft_s=ttft_s))
    long.long = True
    alone = rows(scheduler, 1.0)
    scheduler.settled(MicroBatch((), (), {}, ()), [0])
    scheduler.add(1, 12, 12, now_s=1.0, promise=Promise(ttft_s=1000.0))
    together = rows(scheduler, 1.0)
    assert alone == {0: 48}
    assert together == ({1: 12, 0: 32} if short_first else {0: 48})


def test_decodes_ahead_of_their_promise_lend_time_to_a_late_prompt() -> None:
    sizes = {}
    for policy in ("lars", "lars-slack"):
        scheduler = make(tbt_s=0.05, policy=policy)
        (job,) = decode(scheduler, [5])
        job.tokens = 40  # in no time: the next is due in two seconds
        scheduler.add(0, 900, 900, now_s=-100.0)
        sizes[policy] = rows(scheduler)[0]
    assert sizes == {"lars": 16, "lars-slack": 32}


def test_the_prompt_with_the_least_relative_slack_goes_first() -> None:
    scheduler = make(tbt_s=0.11)
    scheduler.add(0, prompt=400, kv_tokens=400, now_s=0.0)
    scheduler.add(1, prompt=45, kv_tokens=45, now_s=0.0)
    assert list(rows(scheduler)) == [0], "both have time: the long one's share is smaller"
    assert list(rows(scheduler, 0.6)) == [1], "now the short one is late"


ORDERS = {
    "lars": [1, 2, 0],  # slack / work: 0.9, 0.25, 0.8
    "lrs": [1, 2, 0],
    "edf": [1, 0, 2],
    "fcfs": [0, 1, 2],
    "priority": [2, 0, 1],
}


@pytest.mark.parametrize("policy", ORDERS)
def test_policies_order_prompts_as_their_names_say(policy: str) -> None:
    """arrival, deadline and left as slack: 8 of 10 s of work; 0.9 of 4; 5 of 6 — by hand below."""
    asked = (
        # arrival, deadline, work, priority → due, slack at 2, relative
        (0.0, 20.0, 10.0, 0),  # 20, 8.0, 0.80
        (1.0, 6.0, 4.0, 1),  # 7, 1.0, 0.25
        (2.0, 19.0, 12.0, -1),  # 21, 7.0, 0.58
    )
    jobs = [
        Job(id, 10, 10, arrival, work, work, deadline, 1.0, priority, False, None)
        for id, (arrival, deadline, work, priority) in enumerate(asked)
    ]
    order = POLICIES[policy].order
    assert [job.id for job in sorted(jobs, key=lambda job: order(job, 2.0))] == ORDERS[policy]


def test_absolute_slack_is_misled_where_lengths_differ() -> None:
    long = Job(0, 10, 10, 0.0, 100.0, 100.0, 110.0, 1.0, 0, True, None)
    short = Job(1, 10, 10, 0.0, 1.0, 1.0, 12.0, 1.0, 0, False, None)
    lrs, lars = (POLICIES[name].order for name in ("lrs", "lars"))
    assert lrs(long, 0.0) < lrs(short, 0.0)
    assert lrs(long, 5.0) > lrs(short, 5.0) - 5
    assert lars(long, 0.0) < lars(short, 0.0)
    assert lars(long, 11.5) > lars(short, 11.5), "by now the short one has no time left"


def test_groups_that_a_long_request_does_not_use_serve_short_ones_meanwhile() -> None:
    scheduler = make(ON_TWO_GROUPS, tbt_s=0.01)
    scheduler.add(0, prompt=90, kv_tokens=95, now_s=0.0)
    scheduler.add(1, prompt=40, kv_tokens=45, now_s=0.0)
    homes = []
    for group in (0, 1):
        micro_batch = scheduler.next(0.0, {group})
        assert micro_batch is not None and micro_batch.loads.keys() == {group}
        homes += [scheduler.running[chunk.sid].home for chunk in micro_batch.chunks]
    assert homes == [0, 1]


def test_a_group_with_room_need_not_wait_for_one_without() -> None:
    scheduler = make(ON_TWO_GROUPS)
    jobs = decode(scheduler, [20, 20])
    assert [job.home for job in jobs] == [0, 1]
    for group in (1, 0, 1):
        micro_batch = scheduler.next(0.0, {group})
        assert micro_batch is not None
        assert micro_batch.decodes == (jobs[group].sid,)
        assert micro_batch.loads.keys() == {group}
        assert scheduler.next(0.0, {group}) is None
        scheduler.settled(micro_batch, micro_batch.decodes)


def test_a_request_is_given_a_home_where_no_long_prompt_is_computed() -> None:
    """Even where more pages are free there."""
    scheduler = make(ON_TWO_GROUPS)
    (talking,) = decode(scheduler, [90])
    long = scheduler.add(0, 60, 60, now_s=0.0)
    long.long = True
    step(scheduler)
    short = scheduler.add(1, 20, 25, now_s=0.0)
    step(scheduler)
    assert (talking.home, long.home, short.home) == (0, 1, 0)
    assert scheduler.book.available(1) > scheduler.book.available(0)


def test_a_request_on_two_groups_has_them_wait_for_each_other() -> None:
    """Else the short ones of either would keep it waiting for ever."""
    scheduler = make(ON_TWO_GROUPS)
    (wide,) = decode(scheduler, [120])
    (short,) = decode(scheduler, [20], first=101)
    other = 1 - short.home
    assert scheduler.next(0.0, {short.home}) is None
    assert scheduler.next(0.0, {other}) is None
    both = scheduler.next(0.0, {0, 1})
    assert both is not None
    assert set(both.decodes) == {wide.sid, short.sid} and both.groups == {0, 1}
    scheduler.settled(both, [short.sid])
    alone = scheduler.next(0.0, {short.home})
    assert alone is not None and alone.decodes == (short.sid,), "it ties only once it has its token"


def test_a_chunk_ends_where_its_prompt_would_need_a_group_that_others_keep() -> None:
    """Of two long prompts one is first: the other does not join its group before its turn."""
    scheduler = make(dataclasses.replace(ON_TWO_GROUPS, stripe_tokens=90), policy="fcfs")
    for id in range(2):
        scheduler.add(id, 170, 170, now_s=0.0).long = True
    sent = []
    for group in (1, 1, 1, 0):
        micro_batch = scheduler.next(0.0, {group})
        sent.append(micro_batch and [tuple(chunk[1:3]) for chunk in micro_batch.chunks])
    assert sent == [[(0, 50)], [(50, 40)], None, [(0, 50)]]


def test_a_request_takes_on_its_next_group_in_the_middle_of_a_chunk() -> None:
    scheduler = make(ON_TWO_GROUPS)
    scheduler.add(0, prompt=150, kv_tokens=150, now_s=0.0)
    groups = []
    while micro_batch := scheduler.next(0.0):
        groups.append((micro_batch.chunks[0].start, set(micro_batch.loads)))
    assert groups == [
        (0, {0}),
        (50, {0}),
        (100, {0, 1}),
        (120, {0, 1}),
        (140, {0, 1}),
    ]
    assert scheduler.counts.growths == 1


def test_under_helix_every_group_takes_part_in_every_micro_batch() -> None:
    scheduler = make(HELIX)
    scheduler.add(0, prompt=20, kv_tokens=20, now_s=0.0)
    scheduler.add(1, prompt=30, kv_tokens=30, now_s=0.0)
    loads = step(scheduler).loads
    assert set(loads) == {0, 1}
    assert [(load.T, load.X, load.R) for load in loads.values()] == [(50, 50, 1)] * 2
    assert sorted(load.QK for load in loads.values()) == [20 * 21 // 2, 30 * 31 // 2]


def test_a_request_waits_until_all_its_pages_are_free_and_a_dropped_one_frees_them() -> None:
    scheduler = make(policy="fcfs")
    first = scheduler.add(0, prompt=700, kv_tokens=700, now_s=0.0)
    second = scheduler.add(1, prompt=400, kv_tokens=400, now_s=0.0)
    micro_batch = step(scheduler)
    assert (len(scheduler.running), len(scheduler.waiting)) == (1, 1)
    scheduler.drop(first)
    changes = step(scheduler).changes
    assert [change if isinstance(change, int) else change.job.id for change in changes] == [0, 1]  # type: ignore[union-attr]
    scheduler.settled(micro_batch, going_on=[0])  # what was in flight for it comes to nothing
    scheduler.drop(second)
    assert scheduler.next(0.0) is None
    assert scheduler.book.used_fraction == 0


def test_a_request_without_room_is_overtaken_only_while_it_is_in_time() -> None:
    for now_s, running in ((0.0, {0, 2}), (1e6, {0})):
        scheduler = make(policy="fcfs")
        for id, prompt in enumerate((600, 500, 100)):
            scheduler.add(id, prompt, prompt, now_s=0.0)
        scheduler.next(now_s)
        assert {job.id for job in scheduler.running.values()} == running


def test_outputs_take_pages_as_they_grow_and_whoever_came_last_makes_way() -> None:
    """100 pages of 10 tokens. Two prompts of 45 pages each, which both want 20 more."""
    scheduler = make()
    old, young = decode(scheduler, [450, 450], new=200)
    preempted_at = 0
    while old.tokens < 199:
        micro_batch = step(scheduler)
        for sid in micro_batch.decodes:
            scheduler.running[sid].tokens += 1
        scheduler.settled(micro_batch, micro_batch.decodes)
        if young.preemptions and not preempted_at:
            preempted_at = young.tokens
            assert (young.prompt, young.generated) == (450 + young.tokens, young.tokens)
        scheduler.book.audit()
    assert old.preemptions == 0
    assert preempted_at > 50
    scheduler.drop(old)
    step(scheduler)
    assert young.sid in scheduler.running


def test_a_preempted_request_finds_its_pages_again_if_nobody_needed_them() -> None:
    scheduler = make()
    hashes = page_hashes(range(95), 10)
    job = scheduler.add(0, 95, 120, 0.0, hashes=hashes)
    while scheduler.next(0.0):
        pass
    scheduler._preempt(job)
    (again,) = (c for c in step(scheduler).changes if isinstance(c, Admitted))
    assert again.cached == 90
    assert scheduler.counts.hit_tokens == 90
    assert scheduler.next(0.0) is None, "one chunk of five tokens was all there was to do"


def test_a_prompt_in_a_hurry_takes_the_pages_of_one_that_has_time() -> None:
    scheduler = make(tbt_s=0.05)
    easy = scheduler.add(0, 900, 950, 0.0, Promise(ttft_s=1000.0))
    step(scheduler)
    scheduler.add(1, 300, 310, 0.0, Promise(ttft_s=0.1))
    assert list(rows(scheduler, 0.06)) == [1]
    assert (easy.preemptions, easy.sid) == (1, -1)
    for _ in range(5):
        scheduler.next(0.2)
    assert easy.sid == -1, "and does not come back as long as there is no room"


def test_a_prompt_is_put_off_for_others_only_so_often() -> None:
    scheduler = make(tbt_s=0.05)
    easy = scheduler.add(0, 900, 950, 0.0, Promise(ttft_s=1e6))
    for id in range(1, 8):
        step(scheduler, now_s=float(id))
        urgent = scheduler.add(id, 300, 310, float(id), Promise(ttft_s=0.1))
        scheduler.next(id + 0.1)
        scheduler.drop(urgent)
        scheduler.next(id + 0.2)
    assert easy.preemptions == 3
    assert easy.sid in scheduler.running


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
