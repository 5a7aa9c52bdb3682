"""Where sums over tp are read from the peers' memory, what that is said to gain, and what may be pinned."""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
from mnemoc.artifact import NCCL, Plan, Workload
from mnemoc.errors import UsageError
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import fuse, one_shot, shard
from mnemoc.layout import Layout
from mnemoc.planner import load_cluster, make_plan
from mnemoc.planner.check import violations
from mnemoc.planner.chunks import Sizes
from mnemoc.planner.cluster import Cluster
from mnemoc.planner.configuration import Configuration
from mnemoc.planner.cost import Links, one_shot_rows, price_terms
from mnemoc.planner.counting import count
from mnemoc.planner.forecast import forecast
from mnemoc.planner.formulas import compile_parts, compile_totals, stage_formulas, tabulate

H100, ALPHA, BETA = load_cluster("dgx-h100"), 2.5e-6, 450e9 * 0.8


def changed(**numbers: float) -> Cluster:
    """The cluster, with other numbers by their keys' last parts; 0: unknown."""
    kept = dict(H100.numbers)
    for name, value in numbers.items():
        key = f"links.intra.{name}"
        if value:
            kept[key] = dataclasses.replace(kept[key], value=value)
        else:
            del kept[key]
    return dataclasses.replace(H100, numbers=kept)


@pytest.mark.parametrize("tp", [3, 4, 8])
def test_the_last_row_that_is_read_is_the_last_that_nccl_sums_no_sooner(tp: int) -> None:
    row_bytes = 8192 * 2

    def read_s(rows: int) -> float:
        return 2 * ALPHA + (tp - 1) * rows * row_bytes / BETA

    def summed_s(rows: int) -> float:
        rounds = 2 * math.ceil(math.log2(tp))
        return rounds * ALPHA + 2 * (tp - 1) / tp * rows * row_bytes / BETA

    rows = one_shot_rows(H100, tp, row_bytes)
    assert rows > 0
    assert read_s(rows) < summed_s(rows)
    assert read_s(rows + 1) >= summed_s(rows + 1)


def test_nothing_is_read_where_nothing_is_gained_or_no_switch_is_known() -> None:
    assert one_shot_rows(H100, 1, 8192) == 0
    assert one_shot_rows(H100, 2, 8192) == 0, "two ranks swap their rows either way"
    assert one_shot_rows(changed(switched=0), 8, 8192) == 0
    assert one_shot_rows(changed(switched=4), 8, 8192) == 0
    assert one_shot_rows(changed(switched=4), 4, 8192) > 0
    assert one_shot_rows(dataclasses.replace(H100, target="cpu"), 8, 8192) == 0


def test_a_sum_costs_whichever_is_less_and_tables_say_what_formulas_say() -> None:
    module = one_shot(fuse(shard(build(load_model("llama-3-70b"), "bfloat16"), tp=8, kvp=1)))
    terms = price_terms(count(module), H100, "bfloat16", module.mesh, Links("intra", "intra"))
    formulas, some = stage_formulas(terms), np.array([1.0, 41.0, 42.0, 1000.0])
    none = np.zeros_like(some)
    sizes = Sizes(some, np.ones_like(some), none, none, some * 1000, none)
    payload = some * 8192 * 2 / BETA
    each_s = np.minimum(2 * ALPHA + 7 * payload, 6 * ALPHA + 2 * 7 / 8 * payload)
    assert compile_parts(formulas)(sizes)["layer"]["communication"] == pytest.approx(2 * each_s)
    for block, seconds in compile_totals(formulas)(sizes).items():
        assert tabulate(terms)(sizes)[block] == pytest.approx(seconds, rel=1e-12)


WORKLOAD = Workload(8192, 60.0, 1.0, objective="ttft")


@cache
def planned(all_reduce: str | None, ffn: str = "repeated") -> Plan:
    """70B on one node, or two where the FFN is cut over both."""
    kvp = 1 if ffn == "repeated" else 2
    pins: dict[str, int | str] = {"tp": 8, "spp": 1, "kvp": kvp, "ffn": ffn}
    pins |= {} if all_reduce is None else {"all_reduce": all_reduce}
    return make_plan(load_model("llama-3-70b"), H100, WORKLOAD, nodes=kvp, pinned=pins).plan


def test_decodes_gain_what_their_sums_do_and_a_plan_says_so() -> None:
    plan, plain = planned(None), planned(NCCL)
    assert (plan.one_shot_rows, plain.one_shot_rows) == (41, 0)
    gained_s = plain.predicted.tbt_s - plan.predicted.tbt_s
    each_s = 4 * ALPHA - (7 - 2 * 7 / 8) * 8192 * 2 / BETA
    assert gained_s == pytest.approx(160 * each_s, rel=1e-6)
    assert any("up to 41 rows" in note for note in plan.notes)
    held = [p.memory.communication_bytes for p in (plan, plain)]
    assert held[0] - held[1] == 2 * 41 * 8192 * 2


def test_sums_over_all_groups_stay_those_of_nccl() -> None:
    assert planned(None, "helix").one_shot_rows == 0


@pytest.mark.parametrize("rows", [42, 4000])
def test_a_plan_that_reads_more_than_pays_fails_its_re_check(rows: int) -> None:
    from mnemoc.planner.price import Pricer

    model = load_model("llama-3-70b")
    formulas = Pricer(model, H100, "bfloat16", WORKLOAD).formulas(Layout(8, 1, 1))
    plan = planned(None)
    assert not violations(plan, model, H100, WORKLOAD, formulas)
    more = dataclasses.replace(plan, one_shot_rows=rows)
    found = violations(more, model, H100, WORKLOAD, formulas)
    assert any("NCCL sums them sooner" in wrong for wrong in found)
    found = violations(plan, model, changed(switched=0), WORKLOAD, formulas)
    assert any("cannot read" in wrong for wrong in found)


@pytest.mark.parametrize("asked", ["ring", 64])
def test_an_all_reduce_that_nobody_knows_is_refused(asked: int | str) -> None:
    pins = {"tp": 8, "all_reduce": asked}
    with pytest.raises(UsageError, match="unknown all_reduce"):
        make_plan(load_model("llama-3-70b"), H100, WORKLOAD, nodes=1, pinned=pins)


def test_a_forecast_sums_as_a_plan_would() -> None:
    asked = Configuration(Layout(8, 1, 1), 8192)
    said = forecast(load_model("llama-3-70b"), H100, asked)
    plain = forecast(load_model("llama-3-70b"), H100, dataclasses.replace(asked, all_reduce=NCCL))
    assert (said.one_shot_rows, plain.one_shot_rows) == (41, 0)
    assert said.tbt.seconds < plain.tbt.seconds
