"""What goes into a micro-batch: decodes, and chunks beside them."""

from __future__ import annotations

import pytest
from mnemoc.runtime.request import Promise
from mnemoc.runtime.scheduling.job import MicroBatch
from mnemoc.runtime.scheduling.policies import POLICIES

from .conftest import decode, make, rows, step


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
    scheduler.settled(first, [0], first.expected.through_s)
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
    scheduler.running[0].begin(1.0)
    long = scheduler.add(0, 900, 900, now_s=0.0, promise=Promise(ttft_s=ttft_s))
    long.long = True
    alone = rows(scheduler, 1.0)
    scheduler.settled(MicroBatch((), (), {}, ()), [0], 0.0)
    scheduler.add(1, 12, 12, now_s=1.0, promise=Promise(ttft_s=1000.0))
    together = rows(scheduler, 1.0)
    assert alone == {0: 48}
    assert together == ({1: 12, 0: 32} if short_first else {0: 48})


def test_decodes_ahead_of_their_promise_lend_time_to_a_late_prompt() -> None:
    sizes = {}
    for policy in ("lars", "lars-slack"):
        scheduler = make(tbt_s=0.05, policy=policy)
        (job,) = decode(scheduler, [5])
        job.tokens, job.due_s = 40, 2.0  # in no time
        scheduler.add(0, 900, 900, now_s=-100.0)
        sizes[policy] = rows(scheduler)[0]
    assert sizes == {"lars": 16, "lars-slack": 32}
