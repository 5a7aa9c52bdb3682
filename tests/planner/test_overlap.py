"""Where halves are chosen, what they are said to gain, and what may be pinned."""

import dataclasses
from functools import cache

import pytest
from mnemoc.artifact import NEVER_HALVED, Plan, Workload
from mnemoc.errors import BadInput, UsageError
from mnemoc.ir.model import load_model
from mnemoc.layout import Layout
from mnemoc.planner import load_cluster, make_plan
from mnemoc.planner.configuration import Configuration
from mnemoc.planner.forecast import forecast

from .conftest import small_cluster, small_model


@cache
def planned(tbt_s: float, overlap: int | str | None) -> Plan:
    """8B and a million tokens on eight groups, one a node."""
    pins: dict[str, int | str] = {"tp": 8, "spp": 1, "kvp": 8, "ffn": "repeated"}
    pins |= {} if overlap is None else {"overlap": overlap}
    workload = Workload(1_000_000, 1e4, tbt_s, objective="ttft")
    model, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    return make_plan(model, cluster, workload, nodes=8, pinned=pins).plan


def test_a_loose_tbt_leaves_room_for_chunks_that_gain_a_tenth_by_halves() -> None:
    plan, whole = planned(0.5, None), planned(0.5, NEVER_HALVED)
    assert plan.overlap_rows > 0
    assert whole.overlap_rows == 0
    assert plan.predicted.ttft_s < 0.92 * whole.predicted.ttft_s
    assert plan.predicted.ttft_parts_s["communication"] < (
        0.8 * whole.predicted.ttft_parts_s["communication"]
    )
    assert any("in two halves" in note and "Whole, TTFT would be" in note for note in plan.notes)


@pytest.mark.parametrize("tbt_s", [0.5, 0.02, 0.008])
def test_a_plan_is_never_slower_for_having_had_the_choice_of_halves(tbt_s: float) -> None:
    whole = planned(tbt_s, NEVER_HALVED)
    assert planned(tbt_s, None).predicted.ttft_s <= whole.predicted.ttft_s * (1 + 1e-9)


def test_halves_that_are_pinned_are_planned_though_they_lose() -> None:
    model, cluster = small_model(), small_cluster()
    workload = Workload(9000, 1e4, 10.0)
    pins = {"tp": 1, "spp": 1, "kvp": 2}
    pinned = make_plan(model, cluster, workload, pinned={**pins, "overlap": 128}).plan
    free = make_plan(model, cluster, workload, pinned=pins).plan
    assert (pinned.overlap_rows, free.overlap_rows) == (128, 0)
    assert pinned.predicted.ttft_s >= free.predicted.ttft_s


@pytest.mark.parametrize(
    ("pins", "error"),
    [
        ({"overlap": 1}, UsageError),
        ({"overlap": "always"}, UsageError),
        ({"overlap": 64, "kvp": 1}, UsageError),
        ({"overlaps": 64}, UsageError),
    ],
)
def test_an_overlap_that_makes_no_sense_is_refused(
    pins: dict[str, int | str], error: type[BadInput]
) -> None:
    with pytest.raises(error):
        make_plan(small_model(), small_cluster(), Workload(9000, 1e4, 10.0), pinned=pins)


def test_a_forecast_goes_in_halves_as_a_plan_would() -> None:
    asked = Configuration(Layout(8, 1, 8), 1_000_000, chunk=4096)
    model, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    said = forecast(model, cluster, asked)
    whole = forecast(model, cluster, dataclasses.replace(asked, overlap=NEVER_HALVED))
    assert 0 < said.overlap_rows <= 4096
    assert whole.overlap_rows == 0
    assert said.ttft.seconds < 0.95 * whole.ttft.seconds
