"""Who gets pages and when, and who gives them up."""

from __future__ import annotations

from mnemoc.runtime.request import Promise
from mnemoc.runtime.scheduling.job import Admitted
from mnemoc.runtime.scheduling.prefix import page_hashes

from .conftest import decode, make, rows, step


def test_a_request_waits_until_all_its_pages_are_free_and_a_dropped_one_frees_them() -> None:
    scheduler = make(policy="fcfs")
    first = scheduler.add(0, prompt=700, kv_tokens=700, now_s=0.0)
    second = scheduler.add(1, prompt=400, kv_tokens=400, now_s=0.0)
    micro_batch = step(scheduler)
    assert (len(scheduler.running), len(scheduler.waiting)) == (1, 1)
    scheduler.drop(first)
    changes = step(scheduler).changes
    assert [change if isinstance(change, int) else change.job.id for change in changes] == [0, 1]  # type: ignore[union-attr]
    # what was in flight for it comes to nothing
    scheduler.settled(micro_batch, [0], micro_batch.expected.through_s)
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
        scheduler.settled(micro_batch, micro_batch.decodes, micro_batch.expected.through_s)
        if young.preemptions and not preempted_at:
            preempted_at = young.tokens
            assert (young.prompt, young.generated) == (450 + young.tokens, young.tokens)
        scheduler.book.audit()
    assert old.preemptions == 0
    assert preempted_at == 50, "then all 100 pages are taken"
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
