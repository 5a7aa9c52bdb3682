"""What a plan makes of memory that its promise leaves: decodes, rows and KV pages."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Plan, Workload
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.layout import Layout
from mnemoc.planner import Cluster, WhatIf, load_cluster, make_plan
from mnemoc.planner.chunks import Sizes
from mnemoc.planner.cluster import Quantity
from mnemoc.planner.footprint import kept_per_page
from mnemoc.planner.room import CPU_SHARE, LEAST_TOKENS, MOST_DECODES
from mnemoc.planner.search import Finding
from mnemoc.planner.space import Pins

from .conftest import small_cluster, small_model

WORKLOAD = Workload(9000, 1e4, 10.0, 64, 2)
PINS = {"tp": 1, "spp": 2, "kvp": 2}


def gpus(**changed: float) -> Cluster:
    """The small cluster, as if its devices had memory of their own."""
    return dataclasses.replace(
        small_cluster(memory__communicator=1e6, **changed), target="cuda:sm_90"
    )


def planned(machine: Cluster) -> Plan:
    return make_plan(small_model(), machine, WORKLOAD, pinned=PINS).plan


def found(machine: Cluster, spec: ModelSpec, pins: Pins) -> Finding:
    question = WhatIf(spec, machine, WORKLOAD, pinned=pins)
    best = question.search.incumbent(question.promise, WORKLOAD.objective)
    assert best is not None
    return best


def test_what_is_left_of_a_gpu_becomes_pages_to_the_last_one_that_fits() -> None:
    plan = planned(gpus())
    held = plan.memory
    growth = found(gpus(), small_model(), PINS).outlook.growth
    page_bytes = held.room_kv_bytes // (plan.num_pages - plan.promised_pages)
    assert plan.promised_pages == growth.pages
    left = held.capacity_bytes - held.used_bytes
    assert 0 <= left < page_bytes + kept_per_page(growth)
    assert plan.max_batch == MOST_DECODES


def test_the_choice_knows_nothing_of_it() -> None:
    """More memory than needed changes room, and nothing else."""
    small, large = planned(gpus()), planned(gpus(memory__capacity=5e9))
    assert large.num_pages > small.num_pages
    assert dataclasses.replace(large, num_pages=small.num_pages, memory=small.memory) == small


def test_the_fullest_rank_is_full_and_no_other_is_overfull() -> None:
    pins = {"tp": 8, "spp": 3, "kvp": 1}
    spec, cluster = load_model("llama-3-8b"), load_cluster("dgx-h100")
    plan = make_plan(spec, cluster, Workload(1_000_000, 1e4, 1.0), pinned=pins).plan
    assert len({stage.num_layers for stage in plan.stages}) > 1
    assert plan.memory.used_bytes > 0.999 * plan.memory.capacity_bytes


def test_cores_share_a_machine_whose_memory_is_not_all_ours() -> None:
    held = planned(small_cluster(memory__capacity=4e9)).memory
    assert 0.99 * CPU_SHARE < held.used_bytes / held.capacity_bytes <= CPU_SHARE


def test_a_promise_that_needs_more_than_the_share_of_cores_is_kept_all_the_same() -> None:
    needed = planned(small_cluster()).memory.promised_bytes
    plan = planned(small_cluster(memory__capacity=needed))
    assert plan.memory.used_bytes == plan.memory.promised_bytes == needed
    assert (plan.num_pages, plan.max_batch) == (plan.promised_pages, WORKLOAD.concurrency)


def test_few_decodes_are_counted_where_their_keys_would_find_no_pages() -> None:
    """Between the promise alone and memory for all: never more than pages can hold."""
    least = planned(gpus()).memory.promised_bytes
    batches = []
    for more in (0, 1e5, 3e6, 1e7, 3e7, 1e8):
        plan = planned(gpus(memory__capacity=least + more))
        tokens = plan.num_pages * plan.page_size * plan.layout.kvp
        assert WORKLOAD.concurrency <= plan.max_batch <= max(2, tokens // LEAST_TOKENS)
        assert plan.memory.fits
        batches.append(plan.max_batch)
    assert batches == sorted(batches)
    assert batches[0] == WORKLOAD.concurrency
    assert len(set(batches)) > 3


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from([(1, 1, 1), (1, 3, 1), (2, 1, 2), (1, 2, 3)]),
    ffn=st.sampled_from(["repeated", "helix"]),
    on_cpu=st.booleans(),
    data=st.data(),
)
def test_whatever_makes_up_its_rows_no_step_needs_more_than_was_counted(
    layout: tuple[int, int, int], ffn: str, on_cpu: bool, data: st.DataObject
) -> None:
    degrees = Layout(*layout, ffn if layout[2] == 2 else "repeated")
    machine = small_cluster(memory__capacity=4e9) if on_cpu else gpus()
    spec, pins = small_model(num_heads=8), dataclasses.asdict(degrees)
    plan = make_plan(spec, machine, WORKLOAD, pinned=pins).plan
    outlook = found(machine, spec, pins).outlook
    rows = data.draw(st.integers(1, plan.max_rows))
    logits = data.draw(st.integers(0, min(rows, plan.max_batch + 1)))
    peers = (degrees.kvp if degrees.helix else outlook.growth.groups) - 1
    keys = int(outlook.growth.spread.held(np.array(float(WORKLOAD.context))))
    counts = (rows, logits, 0, data.draw(st.integers(0, keys)), 0, rows * peers)
    sizes = Sizes(*(np.array(float(count)) for count in counts))
    needed = outlook.footprint.step_bytes(sizes, degrees.spp, outlook.kept)
    held = plan.memory
    said = held.activation_bytes + held.workspace_bytes + held.communication_bytes
    assert needed <= said + held.room_step_bytes


def test_host_memory_is_shared_by_the_devices_of_a_node() -> None:
    cluster, spec = load_cluster("dgx-a100"), load_model("llama-3-8b")
    pins = {"tp": 8, "spp": 2, "kvp": 1}
    made = make_plan(spec, cluster, Workload(1_000_000, 1e4, 1.0), nodes=2, pinned=pins)
    page_bytes = 16 * 64 * 2 * 128 * 2  # layers, tokens, K and V of one head
    assert made.plan.host_pages == 10**12 // 8 // page_bytes
    assert made.swap is not None
    assert made.swap.page_s == pytest.approx(page_bytes / 25.6e9)


def test_a_cluster_file_without_a_host_keeps_no_pages_there() -> None:
    made = make_plan(small_model(), small_cluster(), WORKLOAD)
    assert (made.plan.host_pages, made.swap) == (0, None)
    numbers = dict(small_cluster().numbers) | {
        f"host.{key}": Quantity(value, "", "test")
        for key, value in (("latency", 1e-5), ("bandwidth", 1e9), ("memory", 8e8), ("share", 0.5))
    }
    hosted = dataclasses.replace(small_cluster(), numbers=numbers)
    assert hosted.host_bytes == 10**8
    assert make_plan(small_model(), hosted, WORKLOAD).plan.host_pages > 0
