"""One rank of a plan alone in this process: every micro-batch runs, and what it computes is right."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from array import array
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.artifact import ChunkRule, Manifest, Stage
from mnemoc.errors import BadInput, UsageError
from mnemoc.folder import load_artifact
from mnemoc.layout import Layout
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.measuring import alone
from mnemoc.runtime.measuring.alone import BACKEND, Supply, random_weights
from mnemoc.runtime.measuring.replay import Replay
from mnemoc.runtime.measuring.walk import Asked, MicroBatch, Walk
from mnemoc.runtime.protocol.messages import Admission, Step
from mnemoc.runtime.scheduling.growth import Growth

LAYOUTS = [
    Layout(2, 1, 1),
    Layout(1, 2, 1),
    Layout(1, 1, 2),
    Layout(2, 1, 2, "helix"),
    Layout(2, 2, 2),
]
RANKS = [
    pytest.param(layout, rank, id=f"rank {rank} of {layout}")
    for layout in LAYOUTS
    for rank in sorted({0, layout.gpus // 2, layout.gpus - 1})
]


@pytest.mark.parametrize(("layout", "rank"), RANKS)
def test_a_rank_runs_alone(layout: Layout, rank: int, models: Any, plans: Any) -> None:
    plan = plans(models(), **dataclasses.asdict(layout))
    with Replay.open(plan, Asked(rank, prompt=300, decodes=3)) as replay:
        found = replay.run()
    assert not dist.is_initialized()
    stage, group, tp_rank = layout.coordinates(rank)
    assert (found.stage, found.group, found.tp_rank) == (stage, group, tp_rank)
    *chunks, decode = [one.batch for one in found.micro_batches]
    assert decode == MicroBatch("decode", 3, 300)
    sees = 96 * group if layout.kvp > 1 and not layout.helix else 0  # from this token on
    ends = [0, 48, 96, *range(116, 300, 20), 300]
    every = [MicroBatch("prefill", end - n, n) for n, end in itertools.pairwise(ends)]
    assert chunks == [chunk for chunk in every if chunk.cached + chunk.rows > sees]
    for one in found.micro_batches:
        assert one.measured_s > 0
        assert one.predicted_s > 0
        swaps = layout.kvp > 1 and one.batch.cached + one.batch.rows > 96
        listens = layout.helix and group > 0  # without a key of its own
        assert (one.supplied_s > 0) == (stage > 0 or swaps or listens)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rank_that_has_no_peers_computes_what_the_engine_does(
    family: str, models: Any, plans: Any, nursery: Any
) -> None:
    model = models(family)
    plan = plans(model)
    prompt = tuple(torch.arange(3, 153).mul(37).remainder(256).tolist())
    with Engine.start(plan, model, nursery=nursery) as engine:
        sampling = Sampling(ignore_eos=True)
        expected = engine.submit(Request(prompt, 4, sampling, logits="all")).result()
    sizes = [48, 48, 20, 20, 14]  # as its plan says
    with (
        Replay.open(plan, Asked(0, model, prompt=150, pages=40)) as replay,
        torch.inference_mode(),
    ):
        tokens, pages = array("i", prompt), (((0, 10),),)
        request = Admission(7, 0, 154, Sampling(), "all", tokens, 0, 0, pages)
        steps = [Step(0, [request]), *(Step(0, (), (), [(7, rows)]) for rows in sizes)]
        steps += [Step(0, (), [(7, token)]) for token in expected.tokens[:-1]]
        done = []
        for step in steps:
            prepared = replay.stage.prepare(step)
            launched = replay.stage.launch(prepared) if prepared else None
            done += [replay.stage.finish(launched)] if launched else []
    rows = [np.frombuffer(data, np.float32) for one in done for *_, data in one.logits]
    found = np.concatenate(rows).reshape(expected.logits.shape)
    np.testing.assert_allclose(found, expected.logits, atol=1e-5)
    tokens = [token for one in done for _, token in one.tokens]
    assert tokens == list(expected.tokens)


def test_one_rank_of_128_needs_no_other(models: Any, plans: Any) -> None:
    """A middle stage in the last KVP group, late in a prompt that 128 ranks would share."""
    wide = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 16}
    model = models("mistral", num_hidden_layers=8, **wide)
    plan = plans(
        model,
        tp=8,
        spp=4,
        kvp=4,
        stages=tuple(Stage(f"stage_{i}", 2 * i, 2) for i in range(4)),
        chunks=(ChunkRule(0, 10**6, 64, 4, 1e-3),),
        stripe_tokens=512,
        num_pages=20_000,
        context=10**6,
    )
    rank = Layout(8, 4, 4).rank(2, 3, 5)
    with Replay.open(plan, Asked(rank, steps=4)) as replay:
        found = replay.run()
    places = [one.batch.cached for one in found.micro_batches]
    assert places[0] == 3 * 512  # where the fourth group's first stripe begins
    assert places[-2:] == [10**6 - 64, 10**6]
    assert len(places) == 4 + 1
    assert all(one.measured_s > 0 and one.supplied_s > 0 for one in found.micro_batches)
    assert found.memory.pages == -(-Growth(4, 512).held(3, 10**6 + 1) // 16)
    assert found.memory.kv_bytes == found.memory.pages * 16 * 16 * 4 * 2 * 2  # one head, K and V


# ----------------------------------------------------------------------------------- what is missing


@pytest.fixture
def lone() -> Iterator[Supply]:
    """Rank 5 of a world of 8, in which nobody else is."""
    supply = Supply()
    store = dist.HashStore()
    dist.init_process_group(BACKEND, store=store, rank=5, world_size=8, pg_options=supply)
    yield supply
    dist.destroy_process_group()


def test_peers_that_are_not_there_send_numbers_and_change_no_sum(lone: Supply) -> None:
    pair = dist.new_group([4, 5], use_local_synchronization=True)
    mine = torch.arange(6.0).reshape(2, 3)
    dist.all_reduce(mine, group=pair)
    assert mine.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    pieces = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(pieces, mine, group=pair)
    assert all(torch.equal(piece, mine) for piece in pieces)
    rows = torch.full((1000, 64), torch.nan, dtype=torch.bfloat16)
    dist.recv(rows, src=4, group=pair)
    halves = torch.full((30, 5), torch.nan), torch.full((7,), torch.nan, dtype=torch.float8_e4m3fn)
    swaps = [dist.P2POp(dist.irecv, half, 4, pair) for half in halves]
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, 4, pair), *swaps]):
        assert work.wait()
    assert abs(rows.float().std() - 1) < 0.02
    assert all(bool(half.float().isfinite().all()) for half in halves)
    sizes = [shape.numel() for shape, _ in lone.given]
    assert sizes == [64_000, 150, 7]


def test_a_message_that_is_not_waited_for_is_held(lone: Supply) -> None:
    """As on its way it would be: so much memory a step takes."""
    row = torch.ones(3)
    held = weakref.ref(row)
    work = dist.isend(row, dst=6)
    del row
    assert held() is not None
    del work
    assert held() is None


def parameter(name: str, *shape: int, dtype: str = "float32", per_layer: bool = True) -> Any:
    return {"name": name, "shape": shape, "dtype": dtype, "per_layer": per_layer}


def test_random_weights_keep_the_size_of_rows() -> None:
    columns = 400
    program = SimpleNamespace(
        NUM_LAYERS=2,
        PARAMETERS=[
            parameter("embedding", 50, columns, per_layer=False),
            parameter("attention_norm", columns),
            parameter("b_qkv", 300),
            parameter("w_qkv", 300, columns, dtype="bfloat16"),
            parameter("w_o", 300, columns, dtype="float8_e4m3fn"),
            parameter("w_o_scale", 300),
        ],
    )
    cpu = torch.device("cpu")
    weights, again = (random_weights(program, cpu, seed=3) for _ in range(2))
    first, second = weights.layers
    rows = torch.randn(64, columns)
    assert abs(weights.embedding.std() - 1) < 0.05
    assert torch.equal(first.attention_norm, torch.ones(columns))
    assert not first.b_qkv.any()
    assert abs((rows @ first.w_qkv.float().T).std() - 1) < 0.1
    assert abs((rows @ first.w_o.float().T * first.w_o_scale).std() - 1) < 0.1
    assert not torch.equal(first.w_qkv, second.w_qkv)
    assert torch.equal(second.w_qkv, again.layers[1].w_qkv)


# -------------------------------------------------------------------------------- what is predicted


@pytest.fixture(scope="module")
def two_groups(models: Any, plans: Any) -> Manifest:
    manifest, _ = load_artifact(plans(models(), kvp=2))
    return manifest


def test_what_is_predicted_leaves_messages_out(two_groups: Manifest) -> None:
    asked: list[tuple[float, ...]] = []

    def parts(*counts: float) -> tuple[float, ...]:
        asked.append(counts)
        return 5.0, 1.0, 0.25

    cost = ModuleType("cost")
    vars(cost).update(PARTS=("linear", "communication", "launch"), stage_parts_s=parts)
    walk = Walk.of(two_groups, cost, Asked(1, prompt=200, decodes=2))
    first, *_, decode = walk.micro_batches
    assert (first.cached, first.rows) == (96, 20)  # its first stripe begins
    assert walk.predict(first) == (5.25, 1.0)
    assert walk.predict(decode) == (5.25, 1.0)
    pairs = 20 * 21 // 2
    assert asked == [(0, 20, 0, pairs, 20, 0, 20), (0, 2, 0, 0, 0, 2 * 96, 2)]


@given(
    prompt=st.integers(1, 2000),
    steps=st.integers(1, 40),
    chunk=st.none() | st.integers(1, 300),
    rank=st.integers(0, 7),
    helix=st.booleans(),
)
def test_a_walk_samples_the_chunks_that_the_rank_sees(
    prompt: int, steps: int, chunk: int | None, rank: int, helix: bool, two_groups: Manifest
) -> None:
    layout = Layout(2, 1, 4, "helix" if helix else "repeated")
    plan = dataclasses.replace(two_groups.plan, layout=layout)
    manifest = dataclasses.replace(two_groups, plan=plan)
    asked = Asked(rank, prompt=prompt, chunk=chunk, steps=steps, decodes=0)
    walk = Walk.of(manifest, ModuleType("cost"), asked)
    every = Walk.of(manifest, ModuleType("cost"), dataclasses.replace(asked, steps=prompt))
    assert set(walk.micro_batches) <= set(every.micro_batches)
    assert 1 <= len(walk.micro_batches) <= steps
    assert every.micro_batches[-1].cached + every.micro_batches[-1].rows == prompt
    if steps > 1:
        assert walk.micro_batches[0] == every.micro_batches[0]
        assert walk.micro_batches[-1] == every.micro_batches[-1]
    for batch in every.micro_batches:
        load = walk.load(batch)
        assert batch.rows == load.T
        assert helix or load.KV > 0
    held = walk.growth.held(walk.shard, prompt + 1)
    assert walk.pages == max(1, -(-held // plan.page_size))


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(4), "--rank: the plan (tp=2 spp=1 kvp=2) has no such rank (got 4)"),
        (Asked(-1), "give one of 0 to 3"),
        (Asked(0, prompt=2049), "--prompt: there are at most 2.05K tokens of context (got 2049)"),
        (Asked(0, prompt=10, cached=10), "--cached: there are at most 9"),
        (Asked(0, decodes=9), "--decodes: there are at most 8 requests"),
        (Asked(0, prompt=64, pages=4), "--pages: this takes 5 KV pages of 16 tokens (got 4)"),
        (Asked(3, prompt=200, cached=10), "--cached: KVP group 1 does no work for that chunk"),
    ],
)
def test_what_a_rank_cannot_do_is_refused(
    asked: Asked, sentence: str, models: Any, plans: Any
) -> None:
    plan = plans(models(), tp=2, kvp=2)
    with pytest.raises(UsageError) as refused:
        Replay.open(plan, asked)
    assert sentence in str(refused.value)


def test_a_rank_that_does_not_fit_says_what_it_needs(
    models: Any, plans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "free_bytes", lambda device: 100 << 10)
    with pytest.raises(
        BadInput, match=r"rank 1 needs .* \(weights .*, 4 KV pages 24 KiB, a step"
    ) as e:
        Replay.open(plans(models(), tp=2), Asked(1, prompt=50))
    assert "100 KiB are free" in str(e.value)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_plan_without_a_gpu_says_what_to_plan_for(models: Any, plans: Any) -> None:
    plan = plans(models(), target="cuda:sm_90", dtype="bfloat16")
    with pytest.raises(BadInput, match="plan with --target cpu"):
        Replay.open(plan, Asked(0))
