"""Bytes of a rank, against what can be counted by hand (`runtime/rank/test_memory.py` runs the programs)."""

import dataclasses

import numpy as np
import pytest
from mnemoc.artifact import Workload
from mnemoc.errors import BadInput
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.ops.attention import SPLIT_ROWS
from mnemoc.ir.passes import carry, fuse, shard
from mnemoc.layout import Layout
from mnemoc.planner import load_cluster, make_plan
from mnemoc.planner.chunks import Sizes
from mnemoc.planner.configuration import Configuration
from mnemoc.planner.footprint import Footprint, Kept, Step, footprint
from mnemoc.planner.forecast import forecast

from .conftest import small_cluster, small_model

D, H, G, HEAD, FFN, VOCAB = 4096, 32, 8, 128, 14336, 128256  # llama-3-8b


def of_llama(tp: int = 1, kvp: int = 1, ffn: str = "repeated") -> Footprint:
    module = carry(fuse(shard(build(load_model("llama-3-8b")), tp=tp, kvp=kvp, ffn=ffn)))
    return footprint(module, "cuda:sm_90")


def step(rows: int, stages: int = 1, swapped: int = 0, logits: int = 0, **mesh: int) -> Step:
    counts = (rows, logits, 0, 0, 0, swapped)
    sizes = Sizes(*(np.array(float(count)) for count in counts))
    return of_llama(**mesh).step(sizes, stages, Kept(0, 0))


def test_many_rows_need_most_when_a_layer_ends() -> None:
    said = step(1000)
    before = 4 * HEAD + 2 * (3 * D + (H + 2 * G) * HEAD + 2 * H * HEAD) + 4 * H
    after = 2 * (4 * D + 3 * FFN) + 2 * 2 * D  # and what the next layer starts from
    assert said.activation == 1000 * (before + after)
    assert said.workspace == 1000 * 2 * 24
    assert said.communication == 0


def test_few_rows_need_most_when_their_keys_are_split() -> None:
    said = step(10)
    assert said.workspace == 10 * 2 * 24 + SPLIT_ROWS * (HEAD + 1) * 4
    assert said.activation < 10 * 2 * (9 * D + 3 * FFN)


def test_many_logits_need_most_in_the_head_and_more_where_they_are_gathered() -> None:
    alone, four = step(300, logits=300), step(300, logits=300, tp=4)
    carried = 300 * (4 * HEAD + 2 * 2 * D)
    assert alone.activation == carried + 300 * (2 * 2 * D + (2 + 4) * VOCAB)
    assert four.communication == 300 * 4 * VOCAB
    assert four.activation == carried + 300 * (2 * 2 * D + (2 + 4) * VOCAB // 4 + 4 * VOCAB)


def test_what_is_swapped_travels_both_ways_and_counts_while_it_does() -> None:
    none, some = step(1000, kvp=2), step(1000, kvp=2, swapped=9000)
    assert none.communication == 0
    assert some.communication == 2 * 9000 * H * (HEAD * 2 + 16)
    assert some.activation < none.activation


def test_a_pipeline_keeps_what_it_sends_longer_than_it_has_stages_and_receives_one_ahead() -> None:
    assert step(1000, stages=4).communication == (5 + 1) * 1000 * 2 * D
    assert step(1000, stages=4).activation == step(1000).activation


def test_a_step_never_needs_less_for_having_more_in_it() -> None:
    needs = of_llama(tp=2, kvp=2)
    sizes = Sizes(*(np.array([count, count + more]) for count, more in ((9.0, 1.0),) * 6))
    few, many = needs.step_bytes(sizes, 2, Kept(0, 0))
    assert few < many
    assert needs.step(sizes, 2, Kept(0, 0)).total.tolist() == [few, many]


def test_each_process_group_has_buffers_of_its_own() -> None:
    cluster = load_cluster("dgx-h100")
    found = {}
    for layout in (Layout(1, 1, 1), Layout(2, 1, 1), Layout(2, 2, 2), Layout(2, 2, 2, "helix")):
        asked = Configuration(layout, 1000, chunk=16)
        found[str(layout)] = forecast(load_model("llama-3-8b"), cluster, asked).memory
    groups = [held.communication_bytes // cluster.communicator_bytes for held in found.values()]
    assert groups == [0, 1, 3, 4]


def test_a_cluster_that_does_not_say_them_serves_one_gpu_alone() -> None:
    cluster = load_cluster("dgx-h100")
    numbers = {k: q for k, q in cluster.numbers.items() if k != "memory.communicator"}
    cluster, model = dataclasses.replace(cluster, numbers=numbers), load_model("llama-3-8b")
    assert forecast(model, cluster, Configuration(Layout(1, 1, 1), 1000)).fits
    with pytest.raises(BadInput, match=r"memory\.communicator of this cluster is not known"):
        forecast(model, cluster, Configuration(Layout(2, 1, 1), 1000))


def test_the_step_that_needs_most_is_named() -> None:
    model, cluster = small_model(), small_cluster()
    chunks = forecast(model, cluster, Configuration(Layout(1, 1, 1), 3000, chunk=500))
    assert chunks.memory.step == "a chunk of 500 tokens after 0"
    decodes = Configuration(Layout(1, 1, 1), 3000, concurrency=64, chunk=16)
    said = forecast(load_model("llama-3-8b"), load_cluster("dgx-h100"), decodes)
    assert said.memory.step == "64 decodes"


def test_chunks_are_as_large_as_memory_has_room_for() -> None:
    spec, workload = small_model(), Workload(4000, 1e6, 1e6, objective="ttft")
    pins = {"tp": 1, "spp": 1, "kvp": 1}
    roomy = make_plan(spec, small_cluster(), workload, pinned=pins).plan
    used = roomy.memory.promised_bytes
    same = make_plan(spec, small_cluster(memory__capacity=used), workload, pinned=pins).plan
    assert same.chunks == roomy.chunks
    tight = make_plan(spec, small_cluster(memory__capacity=used - 1), workload, pinned=pins).plan
    assert tight.memory.promised_bytes < used
    assert tight.predicted.ttft_s > roomy.predicted.ttft_s
