"""One attention case: ours over shuffled pages beside the baselines over contiguous K and V, in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import reference
from .baselines import Attention, Contender, attempt, makers
from .device import Run
from .kernels import FP8, PAGE, Cache, attention, kernel_spec, segments
from .runner import Setup
from .timing import Timing, copies, race
from .work import Heads

AGREES = 2e-2
"""Relative difference of two bfloat16 results of the same function: twice what each may err."""


@dataclass(frozen=True)
class Contest:
    """What is attended to: of each request `rows` new rows behind lengths[i] − rows tokens.

    name: the kernel; kv: the type of the cache; bytes: of one call, for the cache
    """

    name: str
    heads: Heads
    rows: int
    lengths: tuple[int, ...]
    bytes: int
    kv: torch.dtype


@dataclass(frozen=True)
class Outcome:
    """timings by contender; causal: whether it left masked pairs out; refused: why others did not run."""

    timings: dict[str, Timing]
    causal: dict[str, bool]
    refused: dict[str, str]


def contest(setup: Setup, given: Contest, *, baselines: bool, flex: bool = False) -> Outcome | None:
    """Times all; None where the device's memory does not hold the cache."""
    cache = setup.pool.cache(given.heads, given.kv)
    firsts = _firsts(setup, given, cache)
    if not firsts:
        return None
    runs: dict[str, Sequence[Run]] = {"ours": ours(setup, given)}
    causal, refused = {"ours": True}, {}
    if baselines and (reason := _unfit(given)):
        refused["the baselines"] = reason
    elif baselines:
        for name, made in _others(setup, given, cache, firsts, flex):
            if isinstance(made, str):
                refused[name] = made
            else:
                runs[name] = [contender.run for contender in made]
                causal[name] = made[0].causal
    return Outcome(race(setup.device, runs, setup.sizes.least_s), causal, refused)


def ours(setup: Setup, given: Contest, **options: Any) -> list[Run]:
    """Our kernel on as many inputs as no cache holds; options: as `render_kernels` takes them."""
    cache = setup.pool.cache(given.heads, given.kv)
    return [
        _ours(setup, given, cache, _q(setup, given), first, **options)[0]
        for first in _firsts(setup, given, cache)
    ]


def _firsts(setup: Setup, given: Contest, cache: Cache) -> list[int]:
    """The first page of each input; none if the cache has no room for one."""
    stride = sum(_pages(given))
    count = copies(given.bytes, setup.device.machine.cache_bytes)
    return [i * stride for i in range(min(count, cache.tokens // (stride * PAGE)))]


def _pages(given: Contest) -> list[int]:
    return [-(-length // PAGE) for length in given.lengths]


def _q(setup: Setup, given: Contest) -> torch.Tensor:
    """[R, H, rows, d]."""
    shape = (len(given.lengths), given.heads.query, given.rows, given.heads.dim)
    return torch.randn(shape, dtype=setup.device.dtype, device=setup.device.place)


def _ours(
    setup: Setup,
    given: Contest,
    cache: Cache,
    q: torch.Tensor,
    first_page: int,
    *,
    shuffled: bool = True,
    **options: Any,
) -> tuple[Run, torch.Tensor]:
    """The call, and its out [N, H, d]."""
    spec = kernel_spec(setup.device.target, given.heads, setup.device.dtype, kv_dtype=given.kv)
    pages = _pages(given)
    tables = torch.zeros(len(pages), max(pages), dtype=torch.int64)
    for row, count in zip(tables, pages, strict=True):
        order = torch.randperm(count) if shuffled else torch.arange(count)
        row[:count] = first_page + order
        first_page += count
    kinds = [(given.rows, length, length - given.rows) for length in given.lengths]
    cut = segments(setup.device, kinds, tables)
    rows = q.transpose(1, 2).flatten(0, 1).contiguous()
    run, out, _ = attention(
        setup.kernels.load(spec, given.name, **options), given.name, cache, cut, rows
    )
    return run, out


def _unfit(given: Contest) -> str | None:
    """Why no baseline can be given this."""
    if given.kv == FP8:
        return "they take no fp8 K and V beside queries of 16 bits"
    if len(set(given.lengths)) > 1:
        return "requests of different lengths would be padded to the longest"
    return None


def _others(
    setup: Setup, given: Contest, cache: Cache, firsts: Sequence[int], flex: bool
) -> Iterator[tuple[str, list[Contender] | str]]:
    """Each baseline on as many inputs as ours has, checked against ours on one; or why it does not run."""
    requests, tokens = len(given.lengths), given.lengths[0]
    inputs = [
        Attention(_q(setup, given), *cache.contiguous(first, requests, tokens)) for first in firsts
    ]
    run, expected = _ours(setup, given, cache, inputs[0].q, firsts[0], shuffled=False)
    run()
    for name, make in makers(flex=flex).items():
        first = attempt(setup.device, make, inputs[0])
        if isinstance(first, str):
            yield name, first
            continue
        if first.causal:
            theirs = first.run().transpose(1, 2).flatten(0, 1)
            error = reference.relative_error(theirs, expected)
            if error > AGREES:
                yield name, f"computes something else: relative difference {error:.2e}"
                continue
        yield name, [first, *(make(setup.device, each) for each in inputs[1:])]
