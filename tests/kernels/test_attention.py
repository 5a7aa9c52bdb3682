"""Prefill and decode attention of both targets against float64, in every way that a shard can be seen."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_equals_the_reference_on_every_kind_of_segment(
    target: str, shape: Any, kit: Any
) -> None:
    heads, head_dim, page_size = shape
    a_spec = kit.spec(target, heads=heads, head_dim=head_dim, page_size=page_size)
    case = kit.case(a_spec, list(CHUNKS.values()))
    module = kit.load(a_spec, "attention_prefill")
    kit.check(case, case.run(module, "attention_prefill", None if target == "cpu" else 1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_equals_the_reference_on_every_kind_of_shard(
    target: str, shape: Any, kit: Any
) -> None:
    heads, head_dim, page_size = shape
    a_spec = kit.spec(target, heads=heads, head_dim=head_dim, page_size=page_size)
    case = kit.case(a_spec, [(1, kv_len, past) for kv_len, past in DECODES.values()])
    module = kit.load(a_spec, "attention_decode")
    kit.check(case, case.run(module, "attention_decode", None if target == "cpu" else 1))


@pytest.mark.parametrize("name", ["attention_prefill", "attention_decode"])
@pytest.mark.parametrize("splits", [2, 18])
def test_splitting_the_keys_changes_nothing(name: str, splits: int, kit: Any) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=(4, 1))
    cases = [(3, 150, 147), (2, 0, 0), (4, 10, -2), (2, 70, 68)]
    if name == "attention_decode":
        cases = [(1, 150, 149), (1, 0, 3), (1, 10, -1), (1, 70, 80)]
    case = kit.case(a_spec, cases)
    kit.check(case, case.run(kit.load(a_spec, name), name, splits))


@pytest.mark.parametrize("name", ["attention_prefill", "attention_decode"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_half_precision_errs_by_its_rounding_only(name: str, page_size: int, kit: Any) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=(4, 1), page_size=page_size, dtype="float16")
    case = kit.case(a_spec, [(1, 150, 149), (1, 20, 19)])
    kit.check(case, case.run(kit.load(a_spec, name), name, 1))


def test_a_short_chunk_over_a_long_context_fills_the_device(kit: Any) -> None:
    a_spec = kit.spec("cuda:sm_90", heads=(32, 8), head_dim=128, page_size=64)
    long = kit.cut([(32, 1_000_000, 999_968)], torch.zeros(1, 15625))
    launch = kit.load(a_spec, "attention_prefill").prepare(long)
    assert launch.tiles * 8 * launch.splits >= 2 * 132
    launch = kit.load(a_spec, "attention_decode").prepare(
        kit.cut([(1, 1_000_000, 999_999)], long.pages)
    )
    assert 8 * launch.splits >= 2 * 132
    short = kit.cut([(32, 100, 68)], torch.zeros(1, 2))
    assert kit.load(a_spec, "attention_prefill").prepare(short).splits == 1


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_keys_split_anywhere_over_two_groups_merge_to_the_whole(target: str, kit: Any) -> None:
    a_spec = kit.spec(target, heads=(4, 2))
    prefill, merge = kit.load(a_spec, "attention_prefill"), kit.load(a_spec, "merge")

    @settings(max_examples=60 if target == "cpu" else 4)
    @given(st.integers(1, 9), st.integers(0, 60), st.floats(0, 1))
    def holds(rows: int, past: int, share: float) -> None:
        kv_len = past + rows
        first = round(kv_len * share / 16) * 16  # a page's boundary, also at neither end or both
        case = kit.case(a_spec, [(rows, kv_len, past)])
        whole = case.run(prefill, "attention_prefill", None)
        pages = case.segments.pages
        case.segments = kit.cut([(rows, min(first, kv_len), past)], pages)
        out, lse = case.run(prefill, "attention_prefill", None)
        rest = kit.cut([(rows, max(0, kv_len - first), past - first)], pages[:, first // 16 :])
        if rest.pages.shape[1] == 0:
            rest = kit.cut([(rows, 0, past - first)], pages)
        case.segments = rest
        every = torch.arange(rows)
        other = merge.pack(*case.run(prefill, "attention_prefill", None), every)
        with torch.inference_mode():
            merge.merge(out, lse, other, every)
        torch.testing.assert_close((out, lse), whole, atol=2e-6, rtol=1e-5)

    holds()
