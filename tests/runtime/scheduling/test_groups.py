"""Several KVP groups: each at its own pace, and tied where requests tie them."""

from __future__ import annotations

import dataclasses

from .conftest import HELIX, ON_TWO_GROUPS, decode, make, step


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
        scheduler.settled(micro_batch, micro_batch.decodes, micro_batch.expected.through_s)


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
    assert set(both.decodes) == {wide.sid, short.sid} and both.loads.keys() == {0, 1}
    scheduler.settled(both, [short.sid], both.expected.through_s)
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
