"""Why no plan keeps a promise, and what near by can be kept."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Workload
from mnemoc.errors import Infeasible
from mnemoc.ir.model import load_model
from mnemoc.planner import WhatIf, load_cluster, make_plan
from mnemoc.units import format_duration, parse_duration_s

from .conftest import small_cluster, small_model


def why_not(workload: Workload, **cluster: float) -> Infeasible | None:
    try:
        make_plan(small_model(), small_cluster(**cluster), workload)
    except Infeasible as infeasible:
        return infeasible
    return None


@settings(max_examples=20, deadline=None)
@given(
    context=st.integers(500, 60_000),
    ttft_s=st.floats(0.01, 1),
    tbt_s=st.floats(0.002, 0.1),
    concurrency=st.integers(1, 2),
    capacity=st.sampled_from([1.3e8, 1e9]),
)
def test_every_relaxation_that_is_offered_is_feasible(
    context: int, ttft_s: float, tbt_s: float, concurrency: int, capacity: float
) -> None:
    workload = Workload(context, ttft_s, tbt_s, 16, concurrency)
    infeasible = why_not(workload, memory__capacity=capacity)
    for near in infeasible.nearest if infeasible else ():
        moved = dataclasses.replace(workload, ttft_s=near.ttft_s, tbt_s=near.tbt_s)
        nodes = near.nodes if "nodes" in near.relaxed else 2
        assert why_not(moved, nodes=nodes, memory__capacity=capacity) is None, (infeasible, near)
        for name in {"ttft", "tbt"} & set(near.relaxed):
            printed = format_duration(getattr(near, f"{name}_s"))
            assert printed in str(infeasible)
            if printed.count(" ") == 1:
                exact_s = getattr(near, f"{name}_s")
                assert parse_duration_s(printed, name) == pytest.approx(exact_s, rel=1e-12)


@settings(max_examples=12, deadline=None)
@given(context=st.integers(500, 30_000), tight=st.floats(0.3, 0.9))
def test_no_cluster_with_fewer_nodes_would_do(context: int, tight: float) -> None:
    best = WhatIf(small_model(), small_cluster(), Workload(context, 1e4, 1.0)).solve(
        objective="ttft"
    )
    assert best is not None
    workload = Workload(context, best.ttft_s * tight, 1.0)
    infeasible = why_not(workload)
    assert infeasible is not None
    wider = [near for near in infeasible.nearest if "nodes" in near.relaxed]
    for near in wider:
        assert near.nodes > 2
        assert why_not(workload, nodes=near.nodes - 1) is not None
    assert wider or "none would do" in str(infeasible) or "no number of nodes" in str(infeasible)


def test_a_bound_that_no_number_of_nodes_undercuts_is_said() -> None:
    workload = Workload(9000, 1e-4, 1.0)
    sentence = str(why_not(workload))
    assert "no number of nodes of small would do: TTFT stays above" in sentence
    bound_s = parse_duration_s(sentence.rpartition("above ")[2], "bound")
    many = WhatIf(small_model(), small_cluster(), workload)
    best = many.solve(ttft_s=math.inf, gpus=256, objective="ttft")
    assert best is not None
    assert best.ttft_s > bound_s > workload.ttft_s


def test_seventy_billion_on_eight_nodes_in_half_a_minute_is_refused_with_what_would_do() -> None:
    with pytest.raises(Infeasible) as caught:
        make_plan(
            load_model("llama-3-70b"),
            load_cluster("dgx-h100"),
            Workload(1_000_000, 30, 0.03),
            nodes=8,
        )
    assert caught.value.binding == "ttft"
    relaxed = {near.relaxed: near for near in caught.value.nearest}
    assert relaxed["ttft",].ttft_s > 30
    assert relaxed["nodes",].nodes > 8
