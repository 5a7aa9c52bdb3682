"""Layouts, growth and splits."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Workload
from mnemoc.errors import BadInput, UsageError
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.layout import Layout
from mnemoc.planner import Cluster, load_cluster
from mnemoc.planner.space import growths, layouts, splits


def test_every_layout_fits_heads_node_layers_and_devices() -> None:
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    found = layouts(spec, cluster, 64, {})
    assert {layout.tp for layout in found} == {1, 2, 4, 8}
    assert max(layout.spp for layout in found) == spec.num_layers
    assert all(layout.gpus <= 64 for layout in found)
    assert len(set(found)) == len(found)
    assert Layout(4, 4, 4) in found
    assert Layout(8, 3, 2) in found


@pytest.mark.parametrize(
    ("pinned", "error", "complaint"),
    [
        ({"tp": 16}, BadInput, "tp=16 is more than the 8 devices of a node"),
        ({"tp": 3}, BadInput, "does not divide the 32 heads"),
        ({"spp": 33}, BadInput, "spp=33 is more than the 32 layers"),
        ({"tp": 8, "spp": 32, "kvp": 2}, BadInput, "needs 512 devices; the plan may use 256"),
        ({"cp": 2}, UsageError, "unknown axis 'cp'"),
        ({"kvp": 0}, UsageError, "kvp must be at least 1"),
    ],
)
def test_a_pin_that_no_layout_has_is_refused(
    pinned: dict[str, int], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        layouts(load_model("llama-3-8b"), load_cluster("dgx-h100"), 256, pinned)


def test_tp_never_straddles_nodes(
    cluster: Callable[..., Cluster], model: Callable[..., ModelSpec]
) -> None:
    wide = model(num_heads=12, num_kv_heads=6, ffn=696)
    assert {l_.tp for l_ in layouts(wide, cluster(devices_per_node=4), 8, {})} == {1, 2}
    with pytest.raises(BadInput, match="tp=6 is more than the 4 devices of a node"):
        layouts(wide, cluster(devices_per_node=4), 8, {"tp": 6})


def test_tp_divides_the_kv_heads_or_is_a_multiple_of_them(
    cluster: Callable[..., Cluster], model: Callable[..., ModelSpec]
) -> None:
    machine = cluster(nodes=1, devices_per_node=12)
    spec = model(num_heads=12, num_kv_heads=3, ffn=720)
    assert {layout.tp for layout in layouts(spec, machine, 12, {})} == {1, 3, 6, 12}
    with pytest.raises(BadInput, match="tp=4 neither divides nor repeats the 3 KV heads"):
        layouts(spec, machine, 12, {"tp": 4})


def test_pins_leave_only_what_has_them() -> None:
    found = layouts(load_model("llama-3-8b"), load_cluster("dgx-h100"), 64, {"tp": 4, "kvp": 2})
    assert {(layout.tp, layout.kvp) for layout in found} == {(4, 2)}
    assert [layout.spp for layout in found if not layout.helix] == list(range(1, 9))


def test_helix_is_offered_where_there_are_groups_and_all_sizes_divide() -> None:
    spec = load_model("llama-3-8b")
    found = layouts(spec, load_cluster("dgx-h100"), 256, {"spp": 1})
    helix = {(layout.tp, layout.kvp) for layout in found if layout.helix}
    every = {(layout.tp, layout.kvp) for layout in found if not layout.helix}
    assert helix == {(t, k) for t, k in every if k > 1 and 32 % (t * k) == 0}
    assert {
        layout.ffn for layout in layouts(spec, load_cluster("dgx-h100"), 8, {"ffn": "helix"})
    } == {"helix"}


@pytest.mark.parametrize(
    ("pinned", "error", "complaint"),
    [
        ({"ffn": "spiral"}, UsageError, "one of repeated, helix"),
        ({"ffn": "helix", "tp": 8, "kvp": 3}, BadInput, "tp=8,kvp=3 does not allow ffn=helix"),
        ({"ffn": "helix", "tp": 2, "kvp": 1}, BadInput, "helix needs kvp of at least 2"),
        ({"ffn": "helix", "kvp": 1}, BadInput, "no layout of llama-3-8b .* has ffn=helix"),
        ({"kvp": "helix"}, UsageError, "kvp must be at least 1"),
    ],
)
def test_a_helix_that_no_layout_has_is_refused(
    pinned: dict[str, int | str], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        layouts(load_model("llama-3-8b"), load_cluster("dgx-h100"), 256, pinned)


FOUR = Layout(1, 1, 4)
WHOLE = {"stripe": "contiguous"}


def test_contiguous_growth_spreads_requests_over_the_ring_of_groups() -> None:
    six = Workload(10_000, 1, 1, output_tokens=240, concurrency=6)
    by_groups = {g.groups: g for g in growths(FOUR, six, WHOLE)}
    assert set(by_groups) == {1, 2, 4}
    assert by_groups[1].tokens == by_groups[1].stripe == 10_240
    assert by_groups[2].tokens == by_groups[2].stripe == 5_120
    assert [by_groups[a].riders(6).count for a in (1, 2, 4)] == [2, 3, 6]
    assert by_groups[2].pages == 3 * 5_120 // 64
    alone = Workload(10_000, 1, 1, output_tokens=240)
    assert [g.groups for g in growths(FOUR, alone, WHOLE)] == [4]
    assert [g.groups for g in growths(FOUR, alone, {**WHOLE, "kvp": 4})] == [1, 2, 4]


def test_under_helix_each_group_computes_the_decodes_of_all_requests() -> None:
    six = Workload(10_000, 1, 1, output_tokens=240, concurrency=6)
    by_groups = {g.groups: g for g in growths(Layout(1, 1, 4, "helix"), six, WHOLE)}
    assert set(by_groups) == {1, 2, 4}
    for growth in by_groups.values():
        riders = growth.riders(6)
        assert (riders.rows, riders.swapped) == (6, 18)
        assert growth.spread.groups == 4
    assert [by_groups[a].riders(6).count for a in (1, 2, 4)] == [2, 3, 6]


def test_a_group_that_would_hold_nothing_is_no_growth() -> None:
    tiny = Workload(20, 1, 1, output_tokens=4)
    assert [g.groups for g in growths(Layout(1, 1, 8), tiny, {"kvp": 8})] == [1, 2]


def test_stripes_are_offered_beside_contiguous_growth_and_go_round_several_times() -> None:
    found = list(growths(FOUR, Workload(10**7, 1, 1), {}))
    whole, coarse, fine = found
    assert [growth.striped for growth in found] == [False, True, True]
    assert whole.tokens == whole.stripe == 2_500_096
    for growth, rounds in ((coarse, 4), (fine, 32)):
        assert growth.stripe % (840 * 16) == 0
        assert growth.stripe == pytest.approx(10**7 / 4 / rounds, rel=0.2)
        assert whole.tokens <= growth.tokens <= whole.tokens + growth.stripe
    assert all(growth.groups == 4 for growth in found)
    assert not any(growth.striped for growth in growths(Layout(1, 1, 1), Workload(10**7, 1, 1), {}))


@given(
    context=st.integers(1, 10**6),
    kvp=st.integers(1, 9),
    requests=st.integers(1, 4),
    stripe=st.none() | st.integers(1, 10**6),
)
def test_the_home_group_holds_what_dealing_token_by_token_gives_it(
    context: int, kvp: int, requests: int, stripe: int | None
) -> None:
    workload = Workload(context, 1, 1, 16, requests)
    pins = {} if stripe is None else {"stripe": stripe}
    found = list(growths(Layout(1, 1, kvp), workload, pins))
    assert len({growth.stripe for growth in found}) == len(found) <= kvp + 2
    for growth in found:
        total, page = context + 16, growth.page_size
        position = np.arange(total)
        held = int((position // growth.stripe % kvp == 0).sum())
        assert growth.tokens == -(-held // page) * page
        assert growth.stripe % page == 0
        assert growth.groups == min(kvp, -(-total // growth.stripe))


def test_a_pinned_stripe_is_rounded_up_to_what_chunks_need_not_cross() -> None:
    def stripes(context: int, stripe: int | str) -> list[int]:
        return [g.stripe for g in growths(FOUR, Workload(context, 1, 1), {"stripe": stripe})]

    assert stripes(10**7, 64_000) == [5 * 13_440]
    assert stripes(10**7, 13_440) == [13_440]
    assert stripes(3000, 300) == [480]
    assert stripes(10**7, 10**9) == stripes(10**7, "contiguous") == [2_500_096]


@pytest.mark.parametrize(
    ("pinned", "complaint"),
    [
        ({"stripe": "wide"}, "not a stripe"),
        ({"stripe": 0}, "not a stripe"),
        ({"stripe": 64, "kvp": 1}, "stripes need kvp of at least 2"),
    ],
)
def test_a_stripe_that_cannot_be_is_refused(pinned: dict[str, int | str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        layouts(load_model("llama-3-8b"), load_cluster("dgx-h100"), 256, pinned)


def compositions(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)) for cut in cuts]


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 12),
    stages=st.integers(1, 6),
    embed=st.floats(0, 4),
    head=st.floats(0, 4),
)
def test_the_candidate_splits_hold_the_best_of_all_splits(
    layers: int, stages: int, embed: float, head: float
) -> None:
    stages = min(stages, layers)

    def tallest(split: tuple[int, ...]) -> float:
        times = [float(count) for count in split]
        times[0] += embed
        times[-1] += head
        return max(times)

    found = splits(layers, stages, max(embed, head))
    assert all(sum(split) == layers and len(split) == stages and min(split) >= 1 for split in found)
    best = min(map(tallest, compositions(layers, stages)))
    assert min(map(tallest, found)) == pytest.approx(best)
