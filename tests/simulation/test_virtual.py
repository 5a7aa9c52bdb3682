"""Stations: who waits for whom, and for how long."""

from typing import Any

import pytest
from mnemoc.runtime.protocol.messages import Copies
from mnemoc.runtime.scheduling.cost import Load
from mnemoc.runtime.scheduling.growth import Growth
from mnemoc.runtime.scheduling.job import Admitted, Change, Chunk, Job, MicroBatch
from mnemoc.runtime.simulation.virtual import Clock, Stations, Times

from .conftest import make_cost, make_manifest

ROWS = 100
ALONE_S = 1e-3 + ROWS * 1e-5
"""A stage's seconds for ROWS rows, without hop, in `make_cost`."""
HOP_S = 5e-4


def load(rows: int = ROWS, shared: int = 0) -> Load:
    return Load(T=rows, X=shared)


def job(sid: int, prompt: int = 1000, home: int = 0) -> Job:
    return Job(sid, prompt, prompt + 9, 0.0, 1.0, 1.0, 1.0, 0.1, 0, False, None, sid=sid, home=home)


def batch(
    *loads: tuple[int, Load],
    chunks: tuple[Chunk, ...] = (),
    decodes: tuple[int, ...] = (),
    changes: tuple[Change, ...] = (),
) -> MicroBatch:
    return MicroBatch(decodes, chunks, dict(loads), changes)


def admit(job: Job) -> Admitted:
    return Admitted(job, job.sid, job.home, 0, 0, ())


def stations(spp: int = 2, kvp: int = 1, target: str = "cuda:sm_80", **more: Any) -> Stations:
    manifest = make_manifest(spp, kvp, target=target, **more)
    cost = make_cost(spp, overlaps=target != "cpu", swap_s=1e-3)
    return Stations(manifest.plan, cost, Clock())


def ends(stations: Stations) -> list[tuple[float, int, int]]:
    """(when, number, group) of all that is on its way."""
    found = []
    while stations.next_s is not None:
        at_s = stations.next_s
        done = stations.pop()
        found.append((at_s, done.number, done.group))
    return found


@pytest.mark.parametrize("target", ["cuda:sm_80", "cpu"])
@pytest.mark.parametrize("spp", [1, 3])
def test_stages_take_what_the_plans_cost_function_says(target: str, spp: int) -> None:
    plan, cost = make_manifest(spp, target=target).plan, make_cost(spp)
    times = Times(cost, plan)
    counts = Load(7, 1, 30, 40, 50, 0)
    numbers = (counts.T, counts.R, counts.QK, counts.KV, counts.KD, counts.X)
    stages_s, link_s = times.of(counts)
    hops_s = [link_s] * (spp - 1) + [0.0]
    whole = [own + hop for own, hop in zip(stages_s, hops_s, strict=True)]
    assert whole == pytest.approx([cost.stage_s(stage, *numbers) for stage in range(spp)])
    assert sum(whole) == pytest.approx(cost.crossing_s(*numbers))
    assert bool(link_s) == (target != "cpu" and spp > 1)


def test_micro_batches_follow_one_another_through_stages_and_links() -> None:
    line = stations(spp=3)
    for number in range(4):
        line.send(number, batch((0, load())), {})
    first_s = 3 * ALONE_S + 2 * HOP_S
    assert ends(line) == [
        (pytest.approx(first_s + number * ALONE_S), number, 0) for number in range(4)
    ]
    assert line.busy_s[1][0] == pytest.approx(4 * ALONE_S)
    assert line.links_s[1][0] == pytest.approx(4 * HOP_S)


def test_on_a_cpu_the_sender_is_busy_until_its_rows_have_arrived() -> None:
    line = stations(spp=2, target="cpu")
    for number in range(3):
        line.send(number, batch((0, load())), {})
    pace_s, last_s = ALONE_S + HOP_S, ALONE_S
    assert [at_s for at_s, _, _ in ends(line)] == pytest.approx(
        [pace_s * (number + 1) + last_s for number in range(3)]
    )


def test_groups_that_share_nothing_go_their_own_ways() -> None:
    line = stations(spp=1, kvp=3)
    line.send(0, batch((0, load()), (2, load(310))), {})
    line.send(1, batch((0, load())), {})
    assert ends(line) == [
        (pytest.approx(ALONE_S), 0, 0),
        (pytest.approx(2 * ALONE_S), 1, 0),
        (pytest.approx(4.1e-3), 0, 2),
    ]


def test_groups_of_one_request_begin_together_and_take_as_long_as_the_slowest() -> None:
    line = stations(spp=1, kvp=3)
    wide, alone = job(0, home=1), job(1)
    line.send(0, batch((0, load()), changes=(admit(wide), admit(alone))), {})
    chunks = (
        Chunk(0, 200, 40, False),
        Chunk(1, 0, 100, False),
    )  # on groups 1 and 2, and on group 0
    loads = ((1, load(shared=40)), (2, load(300, shared=40)), (0, load()))
    line.send(1, batch(*loads, chunks=chunks), {})
    line.send(2, batch((1, load())), {})
    assert ends(line) == [
        (pytest.approx(ALONE_S), 0, 0),
        (pytest.approx(2 * ALONE_S), 1, 0),
        (pytest.approx(4e-3), 1, 1),
        (pytest.approx(4e-3), 1, 2),
        (pytest.approx(4e-3 + ALONE_S), 2, 1),
    ]


def test_two_wide_requests_tie_their_groups_only_where_they_meet() -> None:
    line = stations(spp=1, kvp=4)
    one, other = job(0, home=0), job(1, home=2)
    chunks = (Chunk(0, 200, 40, False), Chunk(1, 200, 40, False))
    loads = ((0, load(shared=1)), (1, load(shared=1)), (2, load(500, 1)), (3, load(shared=1)))
    line.send(0, batch(*loads, chunks=chunks, changes=(admit(one), admit(other))), {})
    late_s = pytest.approx(6e-3)
    assert [at_s for at_s, _, _ in ends(line)] == [pytest.approx(ALONE_S)] * 2 + [late_s] * 2


def test_under_helix_all_groups_go_together() -> None:
    line = stations(spp=1, kvp=2, ffn="helix")
    line.send(0, batch((0, load()), (1, load(400))), {})
    assert [at_s for at_s, _, _ in ends(line)] == [pytest.approx(5e-3)] * 2


def test_copied_pages_hold_up_their_group_alone() -> None:
    line = stations(spp=2, kvp=2)
    copies = (Copies(0, True, ((1, 1), (2, 2))), Copies(1, False, ((3, 3),)))
    line.send(0, batch((0, load()), changes=copies), {})
    line.send(1, batch((1, load())), {})
    first_s, other_s = 2 * (ALONE_S + 2e-3) + HOP_S, 1e-3 + 2 * ALONE_S + HOP_S
    assert ends(line) == [
        (pytest.approx(other_s), 1, 1),
        (pytest.approx(first_s), 0, 0),
    ]


def test_the_group_that_stores_the_last_position_hands_out_the_token() -> None:
    growth = Growth(kvp=2, stripe_tokens=160)
    line = stations(spp=1, kvp=2)
    asking = job(0, prompt=200, home=1)
    last = batch(
        (1, load(shared=1)),
        (0, load(shared=1)),
        chunks=(Chunk(0, 150, 50, True),),
        changes=(admit(asking),),
    )
    line.send(0, last, {})
    tokens = {done.group: done.tokens for done in (line.pop(), line.pop())}
    owner = growth.group(1, growth.owner(199))
    assert tokens[owner] == [(0, 0)] and not tokens[1 - owner]
    asking.cached = 321  # its row at position 320 is counted: the third stripe, shard 0 again
    line.send(1, batch((1, load(shared=1)), (0, load(shared=1)), decodes=(0,)), {})
    tokens = {done.group: done.tokens for done in (line.pop(), line.pop())}
    assert tokens[1] == [(0, 0)] and not tokens[0]
