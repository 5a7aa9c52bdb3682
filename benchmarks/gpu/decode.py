"""Decode: one new token of 1 to 64 requests, each after 8 K to 4 M, in TB/s of K and V."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import work
from .attending import Contest, contest
from .kernels import FP8, has_fp8, type_name
from .runner import Case, Figures, Section, Setup
from .work import Heads


def cases(setup: Setup) -> Sequence[Case]:
    sizes = setup.sizes
    equal = [(heads, (tokens,) * requests) for heads, requests, tokens in sizes.decode]
    found = [
        _case(setup, heads, lengths, setup.device.dtype)
        for heads, lengths in (*equal, *sizes.ragged)
    ]
    if has_fp8(setup.device.target):
        found[3:3] = [_case(setup, *case, FP8) for case in equal[:4]]
    return found


def _case(setup: Setup, heads: Heads, lengths: tuple[int, ...], kv: torch.dtype) -> Case:
    suffix = ", KV fp8" if kv == FP8 else ""
    return Case(f"{heads.name}, {_said(lengths)}{suffix}", lambda: _rows(setup, heads, lengths, kv))


def _said(lengths: tuple[int, ...]) -> str:
    """Lengths as "64 × 8192", the longest first where they differ."""
    counts = {length: lengths.count(length) for length in sorted(set(lengths), reverse=True)}
    return " + ".join(f"{count} × {length}" for length, count in counts.items())


def _rows(setup: Setup, heads: Heads, lengths: tuple[int, ...], kv: torch.dtype) -> list[Figures]:
    moved = heads.kv_bytes(sum(lengths), kv.itemsize) + heads.row_bytes(len(lengths), 2)
    given = Contest("attention_decode", heads, 1, lengths, moved, kv)
    found = contest(setup, given, baselines=True)
    base: Figures = {
        "heads": heads.name,
        "requests": _said(lengths),
        "kv": type_name(kv),
    }
    if found is None:
        return [base | {"kernel": "ours", "note": "more K and V than this device's memory holds"}]
    flops = work.attention_flops(heads, sum(lengths))
    timed = [
        base
        | {
            "kernel": name,
            "median_s": timing.median_s,
            "bytes_per_s": moved / timing.median_s,
            "share_of_copy": setup.share(moved / timing.median_s, "copy"),
            "flops_per_s": flops / timing.median_s,
            "how": timing.how,
        }
        for name, timing in found.timings.items()
    ]
    return timed + [base | {"kernel": name, "note": why} for name, why in found.refused.items()]


SECTION = Section("decode", "Decode attention", cases)
