"""cost.py says what the planner's formulas say."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc import pipeline
from mnemoc.artifact import Stage, Workload
from mnemoc.codegen.cost import render_cost
from mnemoc.ir.sizes import SYMBOLS
from mnemoc.runtime.loader import ArtifactModules


@pytest.fixture(scope="module", params=[False, True], ids=["captured", "eager"])
def planned(request):
    workload = Workload(context=1_000_000, ttft_s=60.0, tbt_s=0.05)
    pinned = {"tp": 8, "spp": 3, "kvp": 2}
    return pipeline.plan("llama-3-8b", "dgx-h100", workload, pinned=pinned, eager=request.param)


def text_of(planned):
    parts = {block: formula.parts for block, formula in planned.formulas.items()}
    host_s = {block: formula.host_s for block, formula in planned.formulas.items()}
    return render_cost(parts, host_s, planned.plan, planned.swap)


@functools.cache
def loaded(text):
    return ArtifactModules(Path("plan"), {"cost.py": text.encode()}, ("cost",)).load("cost")


def cost_of(planned):
    return loaded(text_of(planned))


@pytest.fixture(scope="module")
def cost(planned):
    return cost_of(planned)


def stage_by_hand(planned, index, values):
    """Σ of the formulas of the blocks that the stage runs."""
    formulas, stages = planned.formulas, planned.plan.stages
    counts = {"step": 1, "entry": 1, "layer": stages[index].num_layers}
    counts["embed"] = int(index == 0)
    counts["head"] = int(index == len(stages) - 1 and values["R"] > 0)
    counts["hop"] = int(index < len(stages) - 1)
    at = {symbol: values[symbol.name] for symbol in SYMBOLS}
    return sum(
        counts[block] * max(float(sum(part.subs(at) for part in f.parts.values())), f.host_s)
        for block, f in formulas.items()
    )


SIZES = st.fixed_dictionaries(
    {
        "T": st.integers(1, 8192),
        "R": st.integers(0, 64),
        "QK": st.integers(0, 10**10),
        "KV": st.integers(0, 10**7),
        "KD": st.integers(0, 10**7),
        "X": st.integers(0, 8192),
    }
)


@settings(max_examples=15)
@given(SIZES)
def test_every_stage_costs_what_its_formulas_say(planned, cost, values):
    expected = [stage_by_hand(planned, i, values) for i in range(3)]
    stages = [cost.stage_s(i, **values) for i in range(3)]
    assert stages == pytest.approx(expected, rel=1e-9)
    sends, hop_s = stages[:-1], sum(cost.hop_parts_s(**values))
    beside = [hop_s, stages[-1], *(seconds - hop_s for seconds in sends)]
    assert cost.pace_s(**values) == pytest.approx(max(beside))
    assert cost.crossing_s(**values) == pytest.approx(sum(stages))
    for index, seconds in enumerate(stages):
        parts = cost.stage_parts_s(index, **values)
        assert len(parts) == len(cost.PARTS)
        assert sum(parts) == pytest.approx(seconds)


def by_parts(cost, values, *, overlaps):
    """(pace, crossing) from the parts of each stage, one by one."""
    stages = [sum(cost.stage_parts_s(s, **values)) for s in range(len(cost.STAGES))]
    if not overlaps:
        return max(stages), sum(stages)
    hop_s = sum(cost.hop_parts_s(**values))
    return max(hop_s, stages[-1], *(seconds - hop_s for seconds in stages[:-1])), sum(stages)


@pytest.mark.parametrize("overlaps", [True, False], ids=["overlapping", "one by one"])
@pytest.mark.parametrize("layers", [(5,), (3, 4), (3, 4, 2, 4, 1), (4, 4, 4, 3)], ids=str)
@settings(max_examples=20)
@given(values=SIZES)
def test_totals_are_their_parts_for_any_stages(planned, layers, overlaps, values):
    stages = tuple(Stage(f"stage_{i}", 0, count) for i, count in enumerate(layers))
    target = planned.plan.target if overlaps else "cpu"
    plan = dataclasses.replace(planned.plan, stages=stages, target=target)
    cost = cost_of(dataclasses.replace(planned, plan=plan))
    pace_s, crossing_s = by_parts(cost, values, overlaps=overlaps and len(layers) > 1)
    assert cost.pace_s(**values) == pytest.approx(pace_s, rel=1e-12)
    assert cost.crossing_s(**values) == pytest.approx(crossing_s, rel=1e-12)
    for stage in range(len(layers)):
        parts = cost.stage_parts_s(stage, **values)
        assert cost.stage_s(stage, **values) == pytest.approx(sum(parts), rel=1e-12)


def test_pages_are_copied_over_the_link_to_the_host_or_not_at_all(planned, cost):
    plan, cluster = planned.plan, planned.cluster
    layers = max(stage.num_layers for stage in plan.stages)
    page_bytes = layers * plan.page_size * 2 * 1 * 128 * 2  # of one KV head
    assert plan.host_pages == 10**12 // 8 // page_bytes
    for pages in (1, 1000):
        expected = layers * cluster["host.latency"] + pages * page_bytes / cluster["host.bandwidth"]
        assert cost.swap_s(pages) == pytest.approx(expected, rel=1e-12)
    assert cost_of(dataclasses.replace(planned, swap=None)).swap_s(1) == math.inf


def test_the_text_is_pure_python_and_golden(planned, golden):
    text = text_of(planned)
    assert "import" not in text.replace("import math", "")
    golden("cost_eager.py" if planned.plan.eager else "cost.py", text)
