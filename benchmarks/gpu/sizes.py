"""What is measured, full and for the rehearsal: shapes of models, chunks, contexts, batches, budgets.

Sweeps are ordered by what matters most: where a section's time runs out, the rest is named, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mnemoc import calibration_kernels, tuning

from .work import Heads

K, M = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Row:
    """Row-wise kernels of one rank of a model. Heads, hidden and ffn are the rank's."""

    heads: Heads
    hidden: int
    ffn: int
    qk_norm: bool = False


@dataclass(frozen=True)
class Sizes:
    """The sweeps.

    copy_bytes, product: of the ceilings; pool_share: of the device's memory for K and V
    heads: of prefill and decode; prefill: (heads, chunk, past); flex: those that flex_attention compiles for
    decode: (heads, requests, tokens); ragged: tokens of requests that differ
    shapes, counts: of row-wise kernels; tokens, pages: of the contexts that correctness checks
    plans: whose stages are replayed; tiles: what a tile is tried on
    quick: whether `calibrate` measures fewer sizes
    least_s: of timing for each contender; budgets: seconds of each section
    """

    copy_bytes: int
    product: int
    pool_share: float
    heads: tuple[Heads, ...]
    prefill: tuple[tuple[Heads, int, int], ...]
    flex: tuple[tuple[Heads, int, int], ...]
    decode: tuple[tuple[Heads, int, int], ...]
    ragged: tuple[tuple[Heads, tuple[int, ...]], ...]
    shapes: tuple[Row, ...]
    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    plans: tuple[str, ...]
    tiles: tuning.Sizes
    quick: bool
    least_s: float
    budgets: Mapping[str, float]


LLAMA_8B = Heads("8B", 32, 8)
LLAMA_70B = Heads("70B tp1", 64, 8)
LLAMA_70B_TP8 = Heads("70B tp8", 8, 1)
LLAMA_405B_TP8 = Heads("405B tp8", 16, 1)

_PREFILL = (
    *((LLAMA_8B, c, n) for c, n in ((8192, 16 * K), (2048, 16 * K), (8192, 128 * K))),
    *((LLAMA_70B_TP8, c, M) for c in (32, 2048, 64, 128, 512)),
    *((LLAMA_8B, c, M) for c in (32, 2048, 64, 128, 512)),
    *((LLAMA_70B, c, n) for c, n in ((8192, 16 * K), (32, 128 * K), (2048, 128 * K))),
    *((LLAMA_405B_TP8, c, n) for c, n in ((8192, 128 * K), (32, M), (2048, M))),
    *((LLAMA_70B_TP8, c, n) for n in (8 * K, 128 * K) for c in (32, 512, 2048, 8192)),
    *((LLAMA_8B, c, n) for n in (8 * K, 128 * K) for c in (32, 128, 512, 2048)),
    *((LLAMA_70B, c, n) for n in (8 * K, M) for c in (32, 2048)),
    *((LLAMA_405B_TP8, c, n) for n in (8 * K, 128 * K) for c in (32, 2048)),
    (LLAMA_70B_TP8, 2048, 4 * M),
    (LLAMA_70B_TP8, 32, 4 * M),
    (LLAMA_70B_TP8, 8192, M),
    (LLAMA_8B, 8192, M),
)
_DECODE = (
    *((LLAMA_70B_TP8, 1, n) for n in (128 * K, M, 4 * M, 32 * K, 8 * K)),
    *((LLAMA_8B, 1, n) for n in (128 * K, M, 8 * K)),
    *((LLAMA_8B, r, n) for r, n in ((64, 8 * K), (16, 32 * K), (64, 32 * K), (4, 128 * K))),
    *((LLAMA_70B_TP8, r, n) for r, n in ((64, 8 * K), (8, 128 * K), (64, 128 * K), (4, M))),
    *((LLAMA_405B_TP8, r, n) for r, n in ((1, 128 * K), (1, M), (1, 4 * M), (16, 32 * K))),
    *((LLAMA_70B, r, n) for r, n in ((1, 128 * K), (64, 8 * K), (4, 128 * K), (1, M))),
    (LLAMA_8B, 16, 128 * K),
    (LLAMA_8B, 1, 4 * M),
)

FULL = Sizes(
    copy_bytes=4 << 30,
    product=8192,
    pool_share=0.45,
    heads=(LLAMA_8B, LLAMA_70B, LLAMA_70B_TP8, LLAMA_405B_TP8),
    prefill=_PREFILL,
    flex=((LLAMA_8B, 8192, 16 * K), (LLAMA_70B_TP8, 2048, M), (LLAMA_70B_TP8, 32, M)),
    decode=_DECODE,
    ragged=(
        (LLAMA_8B, (M, *[8 * K] * 63)),
        (LLAMA_70B_TP8, (4 * M, M, 128 * K, *[8 * K] * 61)),
    ),
    shapes=(
        Row(LLAMA_8B, 4096, 14336),
        Row(LLAMA_70B_TP8, 8192, 3584),
        Row(Heads("qwen3-8b", 32, 8), 4096, 12288, qk_norm=True),
    ),
    counts=(1, 32, 512, 8192),
    tokens=(1000, 20_000, 131_072),
    pages=(64, 16, 128),
    plans=("llama-3-8b", "llama-3-70b"),
    tiles=tuning.Sizes(
        attention=calibration_kernels.search_sizes("cuda:sm_90").attention,
        widths={
            **{"rms_norm": (4096, 8192), "swiglu": (14336, 3584), "rope_append": (128,)},
            **{"merge": (128,), "quantize": (4096,), "swiglu_fp8": (14336,)},
        },
        counts=(32, 2048),
        cold=192 << 20,
    ),
    quick=False,
    least_s=0.15,
    budgets={
        "ceilings": 15,
        "compile": 40,
        "correctness": 60,
        "prefill": 100,
        "decode": 55,
        "rows": 40,
        "calibrate": 40,
        "stage": 55,
        "tiles": 70,
    },
)

_SMALL, _ONE = Heads("4/2 × 64", 4, 2, 64), Heads("4/1 × 64", 4, 1, 64)

TINY = Sizes(
    copy_bytes=1 << 20,
    product=64,
    pool_share=2e-3,
    heads=(_SMALL, _ONE),
    prefill=((_SMALL, 16, 48), (_ONE, 8, 100)),
    flex=((_SMALL, 16, 48), (_ONE, 8, 100)),
    decode=((_SMALL, 2, 64), (_ONE, 1, 128)),
    ragged=((_ONE, (128, 32, 32)),),
    shapes=(Row(_SMALL, 96, 160, qk_norm=True),),
    counts=(1, 5),
    tokens=(40, 100),
    pages=(16,),
    plans=("tiny-llama",),
    tiles=tuning.Sizes(
        attention={
            "attention_prefill": (tuning.Attended(4, 2, 8, (64,)),),
            "attention_decode": (tuning.Attended(4, 1, 1, (64,)),),
        },
        widths={"rms_norm": (384,), "swiglu": (640,), "merge": (64,)},
        counts=(3,),
        cold=1,
    ),
    quick=True,
    least_s=0.0,
    budgets=dict.fromkeys(FULL.budgets, 30),
)
