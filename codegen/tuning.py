"""Candidates for the tables of tiles, and which of those that were timed takes the place of today's.

A candidate differs from today's in one thing: twice or half the keys or queries of a block, a stage or a
program of a multiprocessor more or less, other warps, the copy engine in place of pointers; twice or half the
loads of a thread. One search tries the neighbours; from the best of them, the next goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MnemocError
from ..tiles import ATTENTION, PIECES, WHOLE_ROWS, Cut, MeasuredTiles, Tile
from .aot import Part, compile_parts
from .fitting import refuse_unfit
from .kernels import FLOAT8, KernelSpec, render_kernels
from .rowwise import LOAD_BYTES, MOST_PIECES, head_tile, row_block, row_tile
from .tiles import Tiles, refreshed

ITEMSIZE = 2
"""Bytes of an element: tables are of 16-bit types."""

MARGIN = 0.98
"""Of today's time: what a candidate must stay under in the mean to take its place."""

_VECTOR = 32 * LOAD_BYTES // ITEMSIZE
"""Elements that a warp loads at once."""

TRIES = 3
"""Of the candidates for a place, those that are compiled before none is taken."""


@dataclass(frozen=True)
class Candidate:
    """An entry of the tables. width: columns of a row, or the head dim (see `tiles.Cuts`)."""

    module: str
    width: int
    entry: Tile | Cut

    def __str__(self) -> str:
        return f"{self.module} {self.width}: {self.entry}"


def today(tiles: Tiles, module: str, width: int, page: int) -> Candidate:
    """What the tables have for a module, a width, and pages of so many tokens."""
    if module in ATTENTION:
        choices = tiles.attention(module)
        tile = next(
            tile
            for most, held in choices.items()
            if width <= most
            for tile in held
            if tile.serves(page)
        )
        return Candidate(module, width, tile)
    cut = tiles.rows.get(module, {}).get(width)
    return Candidate(module, width, cut or _derived(module, width))


def _derived(module: str, width: int) -> Cut:
    """The cut that `rowwise` finds."""
    if module in WHOLE_ROWS:
        return Cut(row_tile(width, ITEMSIZE).warps)
    if module == "swiglu":
        block = row_block(width, ITEMSIZE)
        return Cut(block.warps, block.columns // (block.warps * _VECTOR))
    dim = width // 2 if module == "rope_append" else width
    heads = head_tile(dim, ITEMSIZE)
    return Cut(heads.warps, max(1, heads.heads * dim // (heads.warps * _VECTOR)))


def with_candidate(tiles: Tiles, candidate: Candidate) -> Tiles:
    """The tables with a candidate in today's place."""
    if isinstance(candidate.entry, Tile):
        return tiles.with_tile(candidate.module, candidate.width, candidate.entry)
    return tiles.with_cut(candidate.module, candidate.width, candidate.entry)


def neighbours(now: Candidate, page: int) -> list[Candidate]:
    """Candidates that differ from one in one thing, those of most promise first."""
    if isinstance(now.entry, Tile):
        tiles = _neighbours_of_tile(now.entry)
        found: list[Tile | Cut] = [tile for tile in tiles if _possible(tile, page)]
    else:
        found = [*_neighbours_of_cut(now.module, now.width, now.entry)]
    return [Candidate(now.module, now.width, entry) for entry in found]


def _neighbours_of_tile(tile: Tile) -> list[Tile]:
    changes: list[dict[str, Any]] = [
        *({"stages": tile.stages + by} for by in (1, -1)),
        *({"block_n": size} for size in (2 * tile.block_n, tile.block_n // 2)),
        *({"programs": tile.programs + by} for by in (1, -1)),
        *({"warps": warps} for warps in (4, 8) if warps != tile.warps),
        {"bulk": not tile.bulk},
        *({"block_m": size} for size in (tile.block_m // 2, 2 * tile.block_m)),
    ]
    return [dataclasses.replace(tile, **change) for change in changes]


def _possible(tile: Tile, page: int) -> bool:
    """Whether it can be rendered, and would be taken for these pages."""
    blocks = 16 <= tile.block_n <= 256 and 16 <= tile.block_m <= 256
    return blocks and tile.stages > 1 and tile.programs > 0 and tile.serves(page)


def _neighbours_of_cut(module: str, width: int, cut: Cut) -> list[Cut]:
    if module in WHOLE_ROWS:
        every = (Cut(warps) for warps in (1, 2, 4, 8, 16))
        return [
            one
            for one in every
            if one != cut and width <= MOST_PIECES * one.warps * _VECTOR < 16 * width
        ]
    found = [dataclasses.replace(cut, warps=warps) for warps in (2 * cut.warps, cut.warps // 2)]
    found += [dataclasses.replace(cut, loads=loads) for loads in (2 * cut.loads, cut.loads // 2)]
    return [one for one in found if 1 <= one.warps <= 8 and 1 <= one.loads <= 8]


def best(
    before: MeasuredTiles,
    shares: Mapping[Candidate, Sequence[float | None]],
    fits: Callable[[Candidate], bool],
) -> MeasuredTiles:
    """What was measured before, with the fastest that fits wherever one is faster than today's by the margin.

    shares: times of each candidate on all that it was tried on, of today's; None where it did not run
    """
    means = {
        candidate: math.prod(times) ** (1 / len(times))
        for candidate, all_times in shares.items()
        if len(times := [share for share in all_times if share is not None]) == len(all_times) > 0
    }
    by_place: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in sorted(means, key=lambda one: means[one]):
        if means[candidate] < MARGIN:
            by_place.setdefault((candidate.module, candidate.width), []).append(candidate)
    found = before
    for candidates in by_place.values():
        fitting = next((one for one in candidates[:TRIES] if fits(one)), None)
        found = found if fitting is None else with_entry(found, fitting)
    return found


def with_entry(measured: MeasuredTiles, candidate: Candidate) -> MeasuredTiles:
    """Measured tiles with one more, or another."""
    module, width, entry = candidate.module, candidate.width, candidate.entry
    if isinstance(entry, Tile):
        tiles = {**measured.attention.get(module, {}), width: entry}
        return dataclasses.replace(measured, attention={**measured.attention, module: tiles})
    cuts = {**measured.rows.get(module, {}), width: entry}
    return dataclasses.replace(measured, rows={**measured.rows, module: cuts})


def fits(candidate: Candidate, spec: KernelSpec) -> bool:
    """Whether it compiles as plans need it, with no spills and as many programs as meant. It is not run.

    A tile of attention for groups of 1, 8 and 16 heads, with keys of 16 bits and, where there are any, of 8.
    spec: of what was measured
    """
    arch = spec.target.partition(":")[2]
    measured = with_entry(MeasuredTiles(arch, "candidate", {}, {}), candidate)
    try:
        parts = [
            Part(
                variant,
                render_kernels(variant, refreshed(arch, measured)),
                [candidate.module],
                namesakes=candidate.module in ATTENTION,  # what merges has no tile
            )
            for variant in _variants(spec, candidate)
        ]
        for part, kernels in zip(parts, compile_parts(parts), strict=True):
            refuse_unfit((kernel.report for kernel in kernels), part.spec, measured)
    except MnemocError:
        return False
    return True


def _variants(spec: KernelSpec, candidate: Candidate) -> list[KernelSpec]:
    """What plans make of the kernel that a candidate is for."""
    if candidate.module not in ATTENTION:
        return [specialised(spec, candidate.module, candidate.width)]
    caches = [spec.dtype] if spec.target == "cuda:sm_80" else [spec.dtype, FLOAT8]
    return [
        dataclasses.replace(
            spec, num_heads=heads, num_kv_heads=1, merged_heads=heads, kv_dtype=kv_dtype, fp8=False
        )
        for heads in (1, 8, 16)
        for kv_dtype in caches
    ]


def specialised(spec: KernelSpec, module: str, width: int) -> KernelSpec:
    """A spec whose rows of a module are so wide. Head dims stay: they are the spec's."""
    assert module in (*WHOLE_ROWS, *PIECES)
    fp8 = spec.target != "cuda:sm_80"
    if module == "rms_norm":
        return dataclasses.replace(spec, hidden=width, fp8=fp8)
    if module in ("swiglu", "swiglu_fp8"):
        return dataclasses.replace(spec, ffn=width, fp8=fp8)
    if module == "quantize":
        return dataclasses.replace(spec, merged_heads=width // spec.head_dim, fp8=fp8)
    assert width == spec.head_dim
    return spec
