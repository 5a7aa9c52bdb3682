"""The re-check passes every plan that the planner makes, and catches those that were changed."""

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Plan, Workload
from mnemoc.errors import Infeasible
from mnemoc.planner import Made, make_plan
from mnemoc.planner.check import violations

from .conftest import small_cluster, small_model

WORKLOAD = Workload(9000, 3.0, 0.2, 64, 2)


@settings(max_examples=40, deadline=None)
@given(
    context=st.integers(1, 200_000),
    output=st.integers(1, 5000),
    concurrency=st.integers(1, 5),
    ttft_s=st.floats(0.01, 300),
    tbt_s=st.floats(0.001, 2),
    layers=st.integers(1, 9),
    objective=st.sampled_from(["gpus", "ttft", "throughput"]),
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    bias=st.booleans(),
    numbers=st.fixed_dictionaries(
        {
            "nodes": st.integers(1, 3),
            "devices_per_node": st.integers(1, 6),
            "peak__float32": st.floats(1e10, 1e13),
            "memory__bandwidth": st.floats(1e9, 1e12),
            "memory__capacity": st.floats(1.1e8, 2e9),
            "links__inter__latency": st.floats(1e-6, 1e-3),
            "links__inter__bandwidth": st.floats(1e8, 1e11),
            "overhead__iteration": st.floats(0, 1e-3),
        }
    ),
)
def test_every_plan_passes_the_independent_check(
    context: int,
    output: int,
    concurrency: int,
    ttft_s: float,
    tbt_s: float,
    layers: int,
    objective: str,
    kv_heads: int,
    tied: bool,
    bias: bool,
    numbers: dict[str, float],
) -> None:
    spec = small_model(
        num_layers=layers, num_kv_heads=kv_heads, tied_embeddings=tied, qkv_bias=bias
    )
    machine = small_cluster(**numbers)
    workload = Workload(context, ttft_s, tbt_s, output, concurrency, objective)
    try:
        made = make_plan(spec, machine, workload)
    except Infeasible as infeasible:
        assume(infeasible.binding in ("ttft", "tbt", "memory"))
        return
    assert violations(made.plan, spec, machine, workload, made.formulas) == ()


@settings(max_examples=25, deadline=None)
@given(
    context=st.integers(1, 100_000),
    concurrency=st.integers(1, 5),
    tp=st.sampled_from([1, 2, 4]),
    kvp=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([1, 2, 4]),
    devices_per_node=st.sampled_from([4, 8, 16]),
)
def test_every_helix_plan_passes_the_independent_check(
    context: int, concurrency: int, tp: int, kvp: int, kv_heads: int, devices_per_node: int
) -> None:
    spec = small_model(num_kv_heads=kv_heads, num_heads=16)
    machine = small_cluster(devices_per_node=devices_per_node, nodes=4)
    workload = Workload(context, 1e4, 10.0, 100, concurrency)
    pins = {"tp": tp, "kvp": kvp, "ffn": "helix"}
    made = make_plan(spec, machine, workload, gpus=16, pinned=pins)
    assert made.plan.layout.helix
    assert violations(made.plan, spec, machine, workload, made.formulas) == ()
    for broken in ("repeated", "helix"):
        layout = dataclasses.replace(
            made.plan.layout, ffn=broken, kvp=kvp if broken[0] == "r" else 3
        )
        wrong = dataclasses.replace(made.plan, layout=layout)
        assert violations(wrong, spec, machine, workload, made.formulas)


@cache
def made() -> Made:
    pins = {"tp": 1, "spp": 2, "kvp": 2}
    return make_plan(small_model(), small_cluster(), WORKLOAD, pinned=pins)


def changed_rule(plan: Plan, **values: int) -> Plan:
    rules = (*plan.chunks[:-1], dataclasses.replace(plan.chunks[-1], **values))
    return dataclasses.replace(plan, chunks=rules)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: changed_rule(p, chunk=9000), "takes"),
        (lambda p: changed_rule(p, end=8000), "chunk rules end at 8000 of 9000"),
        (lambda p: changed_rule(p, start=1), "chunk rule 1"),
        (lambda p: changed_rule(p, groups=1), "1 groups at 9000 tokens"),
        (lambda p: dataclasses.replace(p, num_pages=p.num_pages - 1), "pages needed"),
        (lambda p: dataclasses.replace(p, stripe_tokens=100), "stripes are not whole pages"),
        (lambda p: dataclasses.replace(p, stripe_tokens=64 * 1000), "2 groups at"),
        (lambda p: dataclasses.replace(p, stages=p.stages[:1]), "stages of"),
        (lambda p: dataclasses.replace(p, max_batch=1), "too few sequences"),
        (lambda p: dataclasses.replace(p, overlap_rows=64), "of 64 rows go in halves, priced is 0"),
        (
            lambda p: dataclasses.replace(p, memory=dataclasses.replace(p.memory, weights_bytes=1)),
            "bytes of weights and KV planned",
        ),
        (
            lambda p: dataclasses.replace(
                p, memory=dataclasses.replace(p.memory, workspace_bytes=0)
            ),
            "do not hold what is kept",
        ),
        (
            lambda p: dataclasses.replace(
                p, memory=dataclasses.replace(p.memory, activation_bytes=0, communication_bytes=0)
            ),
            "planned for a step whose FFN needs",
        ),
        (
            lambda p: dataclasses.replace(
                p, memory=dataclasses.replace(p.memory, activation_bytes=p.memory.capacity_bytes)
            ),
            "the fullest rank does not fit",
        ),
        (
            lambda p: dataclasses.replace(p, memory=dataclasses.replace(p.memory, reserve_bytes=1)),
            "not the cluster's",
        ),
        (
            lambda p: dataclasses.replace(
                p, predicted=dataclasses.replace(p.predicted, ttft_s=p.predicted.ttft_s / 2)
            ),
            "is predicted",
        ),
    ],
)
def test_a_changed_plan_is_caught(change: Callable[[Plan], Plan], complaint: str) -> None:
    plan = made().plan
    sound = violations(plan, small_model(), small_cluster(), WORKLOAD, made().formulas)
    assert sound == ()
    wrong = violations(change(plan), small_model(), small_cluster(), WORKLOAD, made().formulas)
    assert any(complaint in sentence for sentence in wrong), wrong


def test_a_broken_promise_is_caught() -> None:
    for broken, complaint in (
        (dataclasses.replace(WORKLOAD, ttft_s=1e-3), "TTFT"),
        (dataclasses.replace(WORKLOAD, tbt_s=1e-4), "decodes take"),
    ):
        wrong = violations(made().plan, small_model(), small_cluster(), broken, made().formulas)
        assert any(complaint in sentence for sentence in wrong)


@pytest.mark.parametrize("context", [2117, 2154, 2191])
def test_plans_for_short_prompts_in_stripes_pass_their_check(context: int) -> None:
    """Where a stripe is hardly longer than a chunk, the sums of prices are at their loosest."""
    spec, machine = small_model(num_kv_heads=1), small_cluster(devices_per_node=4)
    pins = {"tp": 1, "spp": 1, "kvp": 4, "ffn": "helix"}
    plan = make_plan(spec, machine, Workload(context, 1e4, 1e4, 64, 1, "ttft"), pinned=pins).plan
    assert plan.stripe_tokens * 4 < context
