"""Prefill and decode attention of both targets against float64, in every way that a shard can be seen."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings

TARGETS = ["cpu", "cuda:sm_90"]
SHAPES = [  # (query heads, KV heads), head dim, page size
    ((2, 2), 64, 16),
    ((8, 2), 64, 64),
    ((4, 1), 128, 16),
    ((8, 1), 128, 64),
    ((7, 1), 64, 16),
]
CHUNKS = {  # rows, kv_len, past
    "after a past": (7, 20, 13),
    "non-causal, over a full shard": (5, 30, 100),
    "non-causal, just": (3, 12, 12),
    "the shard starts at a later row": (4, 10, -2),
    "the shard starts after all rows": (3, 10, -9),
    "an empty shard": (6, 0, 0),
    "an empty shard of a late start": (2, 0, -5),
    "no past": (9, 9, 0),
    "partially visible": (8, 12, 6),
    "partially visible at the last row": (8, 12, 5),
    "more keys than any row sees": (5, 40, 10),
    "a single row": (1, 33, 32),
    "over many blocks": (19, 150, 131),
}
DECODES = {  # kv_len, past
    "an empty shard": (0, 5),
    "the newest token here": (33, 32),
    "more keys than seen": (10, 3),
    "the shard starts later": (20, -1),
    "a full shard": (20, 100),
    "over many blocks": (150, 149),
}


KERNELS = ["attention_prefill", "attention_decode"]
VARIANTS = {  # architecture, heads, head dim, page size, dtype, KV dtype (float16: the interpreter's
    # products of bfloat16 are wrong); blocks are copied in bulk from pages of 64 on
    "bulk copies": ("sm_90", (8, 2), 128, 64, "float16", ""),
    "bulk copies, large pages": ("sm_90", (4, 4), 64, 128, "float16", ""),
    "bulk copies, fp8 keys": ("sm_90", (4, 1), 128, 64, "float16", "float8_e4m3fn"),
    "pointers, small pages": ("sm_90", (4, 1), 64, 16, "float16", ""),
    "pointers, pages of no power of two": ("sm_90", (4, 2), 64, 48, "float16", ""),
    "pointers, fp8 keys": ("sm_100", (6, 2), 64, 16, "float16", "float8_e4m3fn"),
    "pointers, sm_80": ("sm_80", (16, 1), 128, 128, "float16", ""),
    "sixteen heads on a KV head": ("sm_90", (16, 1), 64, 64, "float16", ""),
    "seven heads on a KV head": ("sm_90", (7, 1), 128, 64, "float16", ""),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_equals_the_reference_on_every_kind_of_segment(
    target: str, shape: Any, kit: Any
) -> None:
    heads, head_dim, page_size = shape
    a_spec = kit.spec(target, heads=heads, head_dim=head_dim, page_size=page_size)
    case = kit.case(a_spec, list(CHUNKS.values()))
    module = kit.load(a_spec, "attention_prefill", None if target == "cpu" else kit.device(5))
    kit.check(case, case.run(module, "attention_prefill"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_equals_the_reference_on_every_kind_of_shard(
    target: str, shape: Any, kit: Any
) -> None:
    heads, head_dim, page_size = shape
    a_spec = kit.spec(target, heads=heads, head_dim=head_dim, page_size=page_size)
    case = kit.case(a_spec, [(1, kv_len, past) for kv_len, past in DECODES.values()])
    module = kit.load(a_spec, "attention_decode", None if target == "cpu" else kit.device(5))
    kit.check(case, case.run(module, "attention_decode"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_variant_of_the_cuda_kernels_equals_the_reference(
    name: str, variant: str, kit: Any
) -> None:
    arch, heads, head_dim, page_size, dtype, kv_dtype = VARIANTS[variant]
    shape = {"heads": heads, "head_dim": head_dim, "page_size": page_size}
    a_spec = kit.spec(f"cuda:{arch}", **shape, dtype=dtype, kv_dtype=kv_dtype)
    cases = [(9, 9, 0), (2, 0, 0), (2, 300, 298), (3, 130, 200)]
    if name == "attention_decode":
        cases = [(1, kv_len, past) for _, kv_len, past in cases]
    case = kit.case(a_spec, cases)
    module = kit.load(a_spec, name, kit.device(3, arch, split_overhead=0, shortest_run=1))
    kit.check(case, case.run(module, name))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("sms", [1, 7, 40])
def test_any_number_of_programs_gives_the_same(name: str, sms: int, kit: Any) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=(4, 2))
    cases = [(1, 650, 649), (2, 0, 0), (4, 10, -2), *[(2, 20, 18)] * 12, (3, 150, 141)]
    if name == "attention_decode":
        cases = [(1, kv_len, past) for _, kv_len, past in cases]
    case = kit.case(a_spec, cases)
    module = kit.load(a_spec, name, kit.device(sms, split_overhead=0, shortest_run=1))
    kit.check(case, case.run(module, name))


@pytest.mark.parametrize("name", KERNELS)
def test_any_batch_equals_the_reference(name: str, kit: Any) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=(3, 1), head_dim=16)
    module = kit.load(a_spec, name, kit.device(5, split_overhead=32, shortest_run=64))
    rows = st.integers(1, 1 if name == "attention_decode" else 12)
    shards = st.tuples(rows, st.integers(0, 200), st.integers(-9, 220))

    @settings(max_examples=8, phases=[Phase.generate])  # to shrink would take minutes
    @given(st.lists(shards, min_size=1, max_size=4))
    def holds(cases: list[tuple[int, int, int]]) -> None:
        case = kit.case(a_spec, cases)
        kit.check(case, case.run(module, name))

    holds()


@pytest.mark.parametrize("heads", [(32, 8), (8, 1), (28, 4)])
@pytest.mark.parametrize(
    "chunks",
    [
        [(32, 1_000_000)],
        [(64, 131_072)],
        [(2048, 1_000_000)],
        [(512, 20_000), (32, 1_000_000), (128, 4_000)],
        [(100, 3_000)] * 20,
    ],
    ids=str,
)
def test_prefill_fills_the_device_whatever_the_chunks_and_lengths(
    chunks: list[tuple[int, int]], heads: tuple[int, int], kit: Any
) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=heads, head_dim=128, page_size=64, dtype="bfloat16")
    module = kit.load(a_spec, "attention_prefill")
    segments = kit.cut([(rows, n, n - rows) for rows, n in chunks], torch.zeros(len(chunks), 1))
    launch = module.prepare(segments)
    programs, count, plan = module.PROGRAMS, len(chunks), launch.plan.tolist()
    share, busy, kv_heads = plan[-1], [0] * programs, heads[1]
    tile_rows = module.TILE_ROWS.value
    for (rows, n), first, end in zip(chunks, plan, plan[1:], strict=False):
        tiles, splits = -(-rows // tile_rows), max(1, -(-n // share))
        assert end - first == tiles * splits * kv_heads
        for item in range(first, end):  # nearly all rows see all keys: past is long
            busy[item % programs] += min(share, n - (item - first) // tiles % splits * share)
    assert plan[2 * count + 1] <= launch.parts.shape[0] <= module.SLOTS.value
    assert sum(busy) / (programs * max(busy)) > 0.75


def test_a_short_context_is_not_split(kit: Any) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=(32, 8), head_dim=128, page_size=64)
    launch = kit.load(a_spec, "attention_prefill").prepare(
        kit.cut([(32, 100, 68)], torch.zeros(1, 2))
    )
    assert launch.plan[-1] >= 100 and launch.plan[3] == 0  # the share, and no slots


@pytest.mark.parametrize("lengths", [[1_000_000], [131_072, 5, 9_000, 0, 70_000], [700] * 64])
def test_decode_gives_every_program_as_many_blocks(lengths: list[int], kit: Any) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=(8, 1), head_dim=128, page_size=64, dtype="bfloat16")
    module = kit.load(a_spec, "attention_decode")
    shards = kit.cut([(1, n, n - 1) for n in lengths], torch.zeros(len(lengths), 1))
    blocks = module.prepare(shards).ends.tolist()
    n = module.BLOCK_N.value
    assert blocks == [sum(max(1, -(-m // n)) for m in lengths[:i]) for i in range(len(lengths) + 1)]
    programs = min(module.PROGRAMS.value, blocks[-1] // module.SHORTEST.value)
    assert (
        programs >= 175
    )  # of 264: the runs, of blocks[-1] // programs or one more, are long enough


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_keys_split_anywhere_over_two_groups_merge_to_the_whole(target: str, kit: Any) -> None:
    a_spec = kit.spec(target, heads=(4, 2))
    tiles = None if target == "cpu" else kit.device(1)
    prefill, merge = kit.load(a_spec, "attention_prefill", tiles), kit.load(a_spec, "merge")

    @settings(max_examples=60 if target == "cpu" else 4)
    @given(st.integers(1, 9), st.integers(0, 60), st.floats(0, 1))
    def holds(rows: int, past: int, share: float) -> None:
        kv_len = past + rows
        first = round(kv_len * share / 16) * 16  # a page's boundary, also at neither end or both
        case = kit.case(a_spec, [(rows, kv_len, past)])
        whole = case.run(prefill, "attention_prefill")
        pages = case.segments.pages
        case.segments = kit.cut([(rows, min(first, kv_len), past)], pages)
        out, lse = case.run(prefill, "attention_prefill")
        rest = kit.cut([(rows, max(0, kv_len - first), past - first)], pages[:, first // 16 :])
        if rest.pages.shape[1] == 0:
            rest = kit.cut([(rows, 0, past - first)], pages)
        case.segments = rest
        every = torch.arange(rows)
        other = merge.pack(*case.run(prefill, "attention_prefill"), every)
        with torch.inference_mode():
            merge.merge(out, lse, other, every.to(torch.int32)[:, None])
        torch.testing.assert_close((out, lse), whole, atol=2e-6, rtol=1e-5)

    holds()
