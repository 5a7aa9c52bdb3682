"""What experts know, asked of the planner."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Plan, Workload
from mnemoc.codec import from_json, to_json
from mnemoc.errors import BadInput, Infeasible, UsageError
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.layout import Layout
from mnemoc.planner import Cluster, WhatIf, load_cluster, make_plan
from mnemoc.planner.check import lay_out

from .conftest import small_cluster, small_model

TEN_MILLION = Workload(10_000_000, ttft_s=600, tbt_s=0.03)


@cache
def ten_million() -> Plan:
    return make_plan(load_model("llama-3-8b"), load_cluster("dgx-h100"), TEN_MILLION, nodes=16).plan


def test_ten_million_tokens_are_feasible_on_sixteen_nodes_of_h100() -> None:
    plan = ten_million()
    assert plan.gpus <= 128
    assert plan.predicted.ttft_s <= 600
    assert plan.predicted.tbt_s <= 0.03
    assert plan.optimality.gap <= 1e-6
    assert plan.layout.kvp > 1, "one group alone reads 1.34 TB per token over eight GPUs"


def test_chunks_shrink_as_the_context_grows() -> None:
    chunks = [rule.chunk for rule in ten_million().chunks]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] > 20 * chunks[-1]


def test_iterations_take_about_the_same_time_from_start_to_end() -> None:
    times = [rule.iteration_s for rule in ten_million().chunks]
    assert min(times) > 0.6 * max(times)


def test_groups_join_as_the_context_grows() -> None:
    plan = ten_million()
    groups = [rule.groups for rule in plan.chunks]
    assert groups == sorted(groups)
    assert (groups[0], groups[-1]) == (1, plan.layout.kvp)
    joins = [rule.start // plan.stripe_tokens for rule in plan.chunks]
    assert groups == [min(join + 1, plan.layout.kvp) for join in joins]


def test_stripes_share_out_a_context_that_is_still_short() -> None:
    """Contiguous, one group attends to the first five million tokens alone: a third of all the work."""
    args = (load_model("llama-3-8b"), load_cluster("dgx-h100"))
    asked = dataclasses.replace(TEN_MILLION, objective="ttft")
    layout: dict[str, int | str] = {"tp": 8, "spp": 8, "kvp": 2}
    free, whole = (
        make_plan(*args, asked, nodes=16, pinned={**layout, **pins}).plan
        for pins in ({}, {"stripe": "contiguous"})
    )
    assert free.stripe_tokens < whole.stripe_tokens / 16
    saved = 1 - free.predicted.ttft_parts_s["attention"] / whole.predicted.ttft_parts_s["attention"]
    assert saved == pytest.approx(1 / 3, abs=0.03)
    assert any("In one run on each group" in note for note in free.notes)
    assert ten_million().gpus < whole.gpus, "what they save is GPUs, where GPUs are the objective"


def test_contiguous_growth_wins_where_groups_hear_of_one_another_slowly() -> None:
    pins: dict[str, int | str] = {"tp": 1, "spp": 1, "kvp": 4}
    workload = Workload(100_000, 1e6, 1e6, 16, objective="ttft")
    near, far = (
        make_plan(small_model(), small_cluster(**links), workload, pinned=pins).plan
        for links in ({}, {"links__intra__bandwidth": 1e6, "links__inter__bandwidth": 1e6})
    )
    assert near.stripe_tokens * 4 < 100_016 <= far.stripe_tokens * 4
    assert near.chunks[-1].groups == 4


def test_no_planned_chunk_crosses_from_one_stripe_into_the_next() -> None:
    for plan in (
        ten_million(),
        make_plan(
            small_model(),
            small_cluster(),
            Workload(3000, 1e6, 1e6, 16, objective="ttft"),
            pinned={"tp": 1, "spp": 1, "kvp": 2, "stripe": 240},
        ).plan,
    ):
        assert plan.stripe_tokens * plan.layout.kvp < plan.chunks[-1].end
        starts, sizes = lay_out(plan, Workload(plan.chunks[-1].end, 1, 1))
        first, last = starts // plan.stripe_tokens, (starts + sizes - 1) // plan.stripe_tokens
        assert (first == last).all()


@settings(max_examples=20, deadline=None)
@given(
    context=st.integers(200, 20_000),
    concurrency=st.integers(1, 4),
    objective=st.sampled_from(["gpus", "ttft", "throughput"]),
    ttft_s=st.sampled_from([0.2, 1.0, 10.0]),
    bandwidth=st.sampled_from([1e8, 1e10]),
)
def test_a_plan_is_never_worse_for_having_had_the_choice_of_stripes(
    context: int, concurrency: int, objective: str, ttft_s: float, bandwidth: float
) -> None:
    workload = Workload(context, ttft_s, 0.1, 16, concurrency, objective)
    machine = small_cluster(links__intra__bandwidth=bandwidth)
    questions = [
        WhatIf(small_model(), machine, workload, pinned=pins)
        for pins in ({}, {"stripe": "contiguous"})
    ]
    free, whole = (question.solve() for question in questions)
    if whole is None:
        return
    assert free is not None
    sign = -1 if objective == "throughput" else 1
    assert sign * free.objective <= sign * whole.objective * (1 + sign * 1e-9)
    if free.objective == whole.objective:
        assert free.ttft_s <= whole.ttft_s * (1 + 1e-9)


def test_a_minute_for_ten_million_tokens_is_infeasible_and_says_why() -> None:
    with pytest.raises(Infeasible) as caught:
        make_plan(
            load_model("llama-3-8b"),
            load_cluster("dgx-h100"),
            dataclasses.replace(TEN_MILLION, ttft_s=60),
            nodes=16,
        )
    assert caught.value.exit_code == 3
    assert caught.value.binding == "ttft"
    assert "feasible with TTFT" in str(caught.value)
    assert "tp=" in str(caught.value)


def test_the_relaxation_that_is_offered_is_feasible_and_a_little_less_is_not() -> None:
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    best = make_plan(spec, cluster, dataclasses.replace(TEN_MILLION, objective="ttft"), nodes=16)
    least = best.plan.predicted.ttft_s
    assert make_plan(spec, cluster, dataclasses.replace(TEN_MILLION, ttft_s=least), nodes=16)
    with pytest.raises(Infeasible):
        make_plan(spec, cluster, dataclasses.replace(TEN_MILLION, ttft_s=least * 0.999), nodes=16)


def test_decodes_that_are_too_slow_name_tbt() -> None:
    with pytest.raises(Infeasible, match="tbt: no layout") as caught:
        make_plan(
            load_model("llama-3-8b"),
            load_cluster("dgx-h100"),
            dataclasses.replace(TEN_MILLION, tbt_s=0.003),
            nodes=4,
        )
    assert caught.value.binding == "tbt"
    assert "feasible with TBT" in str(caught.value)


def test_weights_that_do_not_fit_name_memory() -> None:
    with pytest.raises(Infeasible, match="memory: weights, KV cache and one step need") as caught:
        make_plan(
            load_model("llama-3.1-405b"),
            load_cluster("dgx-h100"),
            Workload(8192, 10, 0.1),
            nodes=1,
        )
    assert caught.value.binding == "memory"
    assert "devices" in str(caught.value).split(";")[-1]
    (nearest,) = caught.value.nearest
    assert nearest.nodes == 2


def test_pipeline_stages_shorten_a_long_prefill_and_groups_shorten_decodes(
    model: Callable[..., ModelSpec], cluster: Callable[..., Cluster]
) -> None:
    workload = Workload(30_000, 1e4, 1.0)

    def pinned(**degrees: int) -> Plan:
        layout = {"tp": 1, "spp": 1, "kvp": 1} | degrees
        return make_plan(model(), cluster(), workload, pinned=layout).plan

    one, stages, groups = pinned(), pinned(spp=2), pinned(kvp=2)
    assert stages.layout == Layout(1, 2, 1)
    assert stages.predicted.ttft_s < 0.6 * one.predicted.ttft_s
    assert groups.predicted.tbt_s < 0.7 * one.predicted.tbt_s


FEW_KV_HEADS = dataclasses.replace(load_model("llama-3-8b"), num_kv_heads=1)
LONG_DECODES = Workload(1_000_000, 1e4, 1.0, objective="throughput")


def test_helix_is_chosen_where_decodes_read_weights_and_kv_heads_are_few() -> None:
    """tp would repeat the one KV head; kvp cuts the cache, and helix the weights with it."""
    best, repeated = (
        make_plan(FEW_KV_HEADS, load_cluster("dgx-h100"), LONG_DECODES, gpus=8, pinned=pins).plan
        for pins in ({}, {"ffn": "repeated"})
    )
    assert best.layout.helix
    assert best.layout.kvp > repeated.layout.tp
    assert not repeated.layout.helix
    gain = best.predicted.throughput_tokens_per_s / repeated.predicted.throughput_tokens_per_s
    assert gain > 1.1


def test_helix_needs_no_room_for_weights_that_each_group_repeats() -> None:
    pins = {"tp": 2, "spp": 1, "kvp": 4}
    heavy, workload = load_model("llama-3-70b"), Workload(131_072, 1e4, 10.0)
    args = (heavy, load_cluster("dgx-h100"), workload)
    assert make_plan(*args, pinned={**pins, "ffn": "helix"}).plan.layout.helix
    with pytest.raises(Infeasible, match="memory"):
        make_plan(*args, pinned={**pins, "ffn": "repeated"})


@settings(max_examples=20, deadline=None)
@given(
    context=st.integers(200, 20_000),
    concurrency=st.integers(1, 4),
    objective=st.sampled_from(["gpus", "ttft", "throughput"]),
    ttft_s=st.sampled_from([0.2, 1.0, 10.0]),
    latency=st.sampled_from([1e-6, 1e-4]),
)
def test_a_plan_is_never_worse_for_having_had_the_choice_of_helix(
    context: int, concurrency: int, objective: str, ttft_s: float, latency: float
) -> None:
    workload = Workload(context, ttft_s, 0.1, 16, concurrency, objective)
    machine = small_cluster(links__intra__latency=latency, devices_per_node=8)

    def found(pins: dict[str, int | str]) -> tuple[float, float] | None:
        """The named objective, smaller is better, then TTFT."""
        try:
            plan = make_plan(
                small_model(num_kv_heads=1), machine, workload, gpus=8, pinned=pins
            ).plan
        except Infeasible:
            return None
        sign = -1 if objective == "throughput" else 1
        return sign * plan.optimality.objective, plan.predicted.ttft_s

    free, repeated = found({}), found({"ffn": "repeated"})
    if repeated is None:
        return
    assert free is not None
    assert free[0] <= repeated[0] + 1e-5 * abs(repeated[0])
    if free[0] == pytest.approx(repeated[0], rel=1e-7):
        assert free[1] <= repeated[1] * (1 + 1e-5)


def test_an_embedding_or_head_weighs_in_where_layers_are_split(
    model: Callable[..., ModelSpec], cluster: Callable[..., Cluster]
) -> None:
    heavy = model(vocab=200_000, num_layers=7)
    workload = Workload(400, 100.0, 10.0, 16, 8)
    plan = make_plan(heavy, cluster(), workload, pinned={"tp": 1, "spp": 3, "kvp": 1}).plan
    layers = [stage.num_layers for stage in plan.stages]
    assert sum(layers) == 7
    assert layers[-1] == 1, "the head over 200,000 words costs more than a layer"


def test_parts_add_up_and_the_plan_survives_its_manifest() -> None:
    plan = ten_million()
    said = plan.predicted
    assert sum(said.ttft_parts_s.values()) == pytest.approx(said.ttft_s)
    assert sum(said.tbt_parts_s.values()) == pytest.approx(said.tbt_s)
    assert set(said.ttft_parts_s) == {
        "linear", "attention", "communication", "launch", "other", "bubble",
    }  # fmt: skip
    assert from_json(Plan, to_json(plan), "plan") == plan


def test_it_says_what_binds_and_what_else_there_was() -> None:
    plan = ten_million()
    assert plan.binding == "ttft"
    assert len(plan.alternatives) >= 3
    assert all(other.layout != plan.layout and other.reason for other in plan.alternatives)
    assert any("binds" in note for note in plan.notes)
    assert any("RoPE" in note for note in plan.notes)


def test_the_same_question_gets_the_same_plan() -> None:
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    assert make_plan(spec, cluster, TEN_MILLION, nodes=16).plan == ten_million()


def test_a_price_that_is_known_is_said(
    model: Callable[..., ModelSpec], cluster: Callable[..., Cluster]
) -> None:
    priced = cluster(price__device_hour=2.5)
    pins = {"tp": 1, "spp": 2, "kvp": 1}
    notes = make_plan(model(), priced, Workload(1000, 60, 1), pinned=pins).plan.notes
    assert any(note.startswith("5.00 USD per hour") for note in notes)
    unpriced = make_plan(model(), cluster(), Workload(1000, 60, 1)).plan.notes
    assert not any("USD" in note for note in unpriced)


@pytest.mark.parametrize(
    ("objective", "workload", "gpus", "name"),
    [
        ("gpus", Workload(9000, 100.0, 10.0), 8, "none"),
        ("gpus", Workload(9000, 1.2, 10.0), 8, "ttft"),
        ("gpus", Workload(60_000, 100.0, 0.016), 8, "tbt"),
        ("ttft", Workload(60_000, 100.0, 0.02), 8, "tbt"),
        ("throughput", Workload(9000, 100.0, 10.0, concurrency=4), 2, "devices"),
    ],
)
def test_each_promise_binds_somewhere(
    objective: str, workload: Workload, gpus: int, name: str
) -> None:
    asked = dataclasses.replace(workload, objective=objective)
    plan = make_plan(small_model(), small_cluster(), asked, gpus=gpus).plan
    assert plan.binding == name
    assert "bind" in plan.notes[0]


def test_memory_binds_where_fewer_devices_hold_too_little() -> None:
    """Weights and KV of 60,000 tokens take 270 MB."""
    machine = small_cluster(memory__capacity=2.9e8)
    plan = make_plan(small_model(), machine, Workload(60_000, 1000.0, 10.0)).plan
    assert plan.binding == "memory"
    assert plan.gpus > 1


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"context": 0}, "context must be at least 1"),
        ({"output_tokens": 0}, "output_tokens must be at least 1"),
        ({"ttft_s": -1.0}, "ttft_s must be a positive duration"),
        ({"tbt_s": float("nan")}, "tbt_s must be a positive duration"),
        ({"objective": "fame"}, "unknown objective"),
    ],
)
def test_a_promise_that_makes_no_sense_is_refused(
    changed: dict[str, object], complaint: str
) -> None:
    workload = dataclasses.replace(TEN_MILLION, **changed)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=complaint):
        make_plan(load_model("llama-3-8b"), load_cluster("dgx-h100"), workload)


def test_a_target_that_the_devices_do_not_run_is_refused() -> None:
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    for target in ("cpu", "cuda:sm_80", "tpu"):
        with pytest.raises(UsageError):
            make_plan(spec, cluster, TEN_MILLION, target=target)
    local = make_plan(load_model("tiny-llama"), load_cluster("local"), Workload(1000, 60, 1))
    assert (local.plan.target, local.plan.dtype) == ("cpu", "float32")


def test_planning_loads_no_torch_scipy_or_networkx() -> None:
    code = (
        "import sys; from mnemoc.planner import make_plan, load_cluster;"
        "from mnemoc.ir.model import load_model; from mnemoc.artifact import Workload;"
        "make_plan(load_model('tiny-llama'), load_cluster('local'), Workload(1000, 60, 1));"
        "print(sorted({'torch', 'scipy', 'networkx', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
