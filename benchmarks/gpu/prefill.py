"""Chunked prefill: chunks of 32 to 8192 tokens behind contexts of 8 K to 4 M, in TFLOP/s.

At the head of the table of results stands what a plan needs most: what a token of a 32-token chunk costs over
a million tokens, against one of a 2048-token chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import work
from .attending import Contest, Outcome, contest
from .kernels import FP8, has_fp8, type_name
from .runner import Case, Figures, Section, Setup
from .work import Heads


def cases(setup: Setup) -> Sequence[Case]:
    found = [_case(setup, *case, setup.device.dtype) for case in setup.sizes.prefill]
    if has_fp8(setup.device.target):
        found[len(found) // 2 : len(found) // 2] = [
            _case(setup, *case, FP8) for case in setup.sizes.prefill[::6]
        ]
    return found


def _case(setup: Setup, heads: Heads, chunk: int, past: int, kv: torch.dtype) -> Case:
    suffix = ", KV fp8" if kv == FP8 else ""
    return Case(
        f"{heads.name}, {chunk} after {past}{suffix}",
        lambda: _rows(setup, heads, chunk, past, kv),
    )


def _rows(setup: Setup, heads: Heads, chunk: int, past: int, kv: torch.dtype) -> list[Figures]:
    moved = work.prefill_bytes(heads, chunk, past, 2, kv.itemsize)
    flex = (heads, chunk, past) in setup.sizes.flex
    given = Contest("attention_prefill", heads, chunk, (past + chunk,), moved, kv)
    found = contest(setup, given, baselines=True, flex=flex)
    base: Figures = {"heads": heads.name, "chunk": chunk, "past": past, "kv": type_name(kv)}
    if found is None:
        return [base | {"kernel": "ours", "note": "more K and V than this device's memory holds"}]
    return [*_timed(setup, base, given, found), *_refused(base, found)]


def _timed(setup: Setup, base: Figures, given: Contest, found: Outcome) -> list[Figures]:
    chunk, tokens = given.rows, given.lengths[0]
    rows = []
    for name, timing in found.timings.items():
        causal = found.causal[name]
        pairs = work.chunk_pairs(chunk, tokens - chunk) if causal else chunk * tokens
        flops = work.attention_flops(given.heads, pairs)
        rate = flops / timing.median_s
        rows.append(
            base
            | {
                "kernel": name,
                "median_s": timing.median_s,
                "flops_per_s": rate,
                "share_of_peak": setup.share(rate, "bfloat16"),
                "bytes_per_s": given.bytes / timing.median_s,
                "share_of_copy": setup.share(given.bytes / timing.median_s, "copy"),
                "s_per_token": timing.median_s / chunk,
                "how": timing.how,
                "note": None if causal else "all pairs, none masked",
            }
        )
    return rows


def _refused(base: Figures, found: Outcome) -> list[Figures]:
    return [base | {"kernel": name, "note": reason} for name, reason in found.refused.items()]


SECTION = Section("prefill", "Chunked prefill attention", cases)
