"""cost.py says what the planner's formulas say."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc import pipeline
from mnemoc.artifact import Workload
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
    return render_cost(parts, host_s, planned.plan)


@pytest.fixture(scope="module")
def cost(planned):
    contents = {"cost.py": text_of(planned).encode()}
    return ArtifactModules(Path("plan"), contents, ("cost",)).load("cost")


def stage_by_hand(planned, index, values):
    """Σ of the formulas of the blocks that the stage runs."""
    formulas, stages = planned.formulas, planned.plan.stages
    counts = {"step": 1, "rotation": 1, "layer": stages[index].num_layers}
    counts["embed"] = int(index == 0)
    counts["head"] = int(index == len(stages) - 1 and values["R"] > 0)
    counts["hop"] = int(index < len(stages) - 1)
    at = {symbol: values[symbol.name] for symbol in SYMBOLS}
    return sum(
        counts[block] * max(float(sum(part.subs(at) for part in f.parts.values())), f.host_s)
        for block, f in formulas.items()
    )


@settings(max_examples=15)
@given(
    st.fixed_dictionaries(
        {
            "T": st.integers(1, 8192),
            "R": st.integers(0, 64),
            "QK": st.integers(0, 10**10),
            "KV": st.integers(0, 10**7),
            "KD": st.integers(0, 10**7),
            "X": st.integers(0, 8192),
        }
    )
)
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


def test_the_text_is_pure_python_and_golden(planned, golden):
    text = text_of(planned)
    assert "import" not in text.replace("import math", "")
    golden("cost_eager.py" if planned.plan.eager else "cost.py", text)
