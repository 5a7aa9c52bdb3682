"""Searches the tiles of the attention kernels: neighbours of the table's own, timed side by side with it.

A candidate differs from today's tile in one thing: twice or half the keys or queries of a block, a stage or
a program of a multiprocessor more or less, other warps, or the copy engine in place of pointers. It is timed
on shapes that stand for all: long and short chunks, one long request and many. OUT/best_tiles.json has the
table with the fastest first, as `render_kernels(spec, tiles=...)` takes it and `--tiles` measures with;
where nothing is faster by a margin, it is today's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mnemoc.codec import from_json, to_json
from mnemoc.codegen.tiles import Choices, Tile, Tiles
from mnemoc.errors import BadInput
from triton.runtime.errors import OutOfResources

from .attending import Contest, ours
from .runner import Case, Figures, Section, Setup, read
from .timing import race
from .work import Heads

BEST_FILE = "best_tiles.json"
MARGIN = 0.98
"""Of today's time: what a candidate must stay under in the mean to take its place."""

KINDS = ("prefill", "decode")


def cases(setup: Setup) -> Sequence[Case]:
    return [
        Case(f"{kind}, {_said(tile)}", _case(setup, kind, tile))
        for kind in KINDS
        for tile in neighbours(today(setup, kind))
    ]


def today(setup: Setup, kind: str) -> Tile:
    """The table's tile for the head dim of the shapes."""
    return _choices(setup.tiles, kind, setup.sizes.tiles[kind][0][0].dim)[0]


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles that differ from one in one thing, those of most promise first."""
    changes: list[dict[str, Any]] = [
        *({"stages": tile.stages + by} for by in (1, -1)),
        *({"block_n": size} for size in (2 * tile.block_n, tile.block_n // 2)),
        *({"programs": tile.programs + by} for by in (1, -1)),
        *({"warps": warps} for warps in (4, 8) if warps != tile.warps),
        {"bulk": not tile.bulk},
        *({"block_m": size} for size in (tile.block_m // 2, 2 * tile.block_m)),
    ]
    found = [dataclasses.replace(tile, **change) for change in changes]
    return [
        one
        for one in found
        if one.stages > 1 and one.programs > 0 and one.block_n >= 16 and one.block_m >= 16
    ]


def _choices(tiles: Tiles, kind: str, dim: int) -> tuple[Tile, ...]:
    by_dim: Choices = getattr(tiles, kind)
    return next(choices for most, choices in by_dim.items() if dim <= most)


def with_tile(tiles: Tiles, kind: str, dim: int, tile: Tile) -> Tiles:
    """The table with a tile before all others of its head dim; those stay for pages that it cannot serve."""
    by_dim: Choices = getattr(tiles, kind)
    at = next(most for most in by_dim if dim <= most)
    rest = tuple(other for other in by_dim[at] if other != tile)
    changed: dict[str, Any] = {kind: {**by_dim, at: (tile, *rest)}}
    return dataclasses.replace(tiles, **changed)


def _case(setup: Setup, kind: str, tile: Tile) -> Callable[[], list[Figures]]:
    return lambda: [_row(setup, kind, tile, *shape) for shape in setup.sizes.tiles[kind]]


def _row(
    setup: Setup, kind: str, tile: Tile, heads: Heads, rows: int, lengths: tuple[int, ...]
) -> Figures:
    name, kv = f"attention_{kind}", setup.device.dtype
    moved = heads.kv_bytes(sum(lengths), kv.itemsize) + heads.row_bytes(len(lengths) * rows, 2)
    given = Contest(name, heads, rows, lengths, moved, kv)
    row: Figures = {
        "kernel": name,
        "of": f"{heads.name}, {rows} of {len(lengths)} × {lengths[0]}",
        "tile": _said(tile),
        "fields": dataclasses.asdict(tile),
    }
    tables = {"today": setup.tiles, "candidate": with_tile(setup.tiles, kind, heads.dim, tile)}
    try:
        runs = {who: ours(setup, given, tiles=table) for who, table in tables.items()}
        found = race(setup.device, runs, setup.sizes.least_s)
    except OutOfResources as error:
        return row | {"note": str(error).splitlines()[0]}
    spent_s = found["candidate"].median_s
    return row | {"median_s": spent_s, "of_today": spent_s / found["today"].median_s}


def _said(tile: Tile) -> str:
    how = "bulk" if tile.bulk else "pointers"
    return (
        f"{tile.block_m} × {tile.block_n}, {tile.warps} warps, {tile.stages} stages, "
        f"{tile.programs} programs, {how}"
    )


def write_best(setup: Setup) -> None:
    """OUT/best_tiles.json from all candidates that were timed; nothing if none was."""
    rows = [row for rows in read(setup.out, "tiles").values() for row in rows]
    if not rows:
        return
    tiles = setup.tiles
    for kind in KINDS:
        dim = setup.sizes.tiles[kind][0][0].dim
        best = min(_means(rows, kind), default=(1.0, today(setup, kind)), key=lambda one: one[0])
        if best[0] < MARGIN:
            tiles = with_tile(tiles, kind, dim, best[1])
    body = {setup.device.target.partition(":")[2]: to_json(tiles)}
    (setup.out / BEST_FILE).write_text(json.dumps(body, indent=1) + "\n")


def read_best(path: Path, target: str) -> Tiles:
    """The table that `write_best` wrote. BadInput if it has none for the target's architecture."""
    arch = target.partition(":")[2]
    body = json.loads(path.read_text())
    if arch not in body:
        raise BadInput(f"no tiles for {arch}", where=path, got=", ".join(body))
    tiles = from_json(Tiles, body[arch], str(path))
    keyed: dict[str, Any] = {
        kind: {int(dim): c for dim, c in getattr(tiles, kind).items()} for kind in KINDS
    }
    return dataclasses.replace(tiles, **keyed)


def _means(rows: Sequence[Figures], kind: str) -> Iterator[tuple[float, Tile]]:
    """Of each tile that ran on every shape, the mean of its times as shares of today's."""
    by_tile: dict[str, list[Figures]] = {}
    for row in rows:
        if row.get("kernel") == f"attention_{kind}":
            by_tile.setdefault(row["tile"], []).append(row)
    for own in by_tile.values():
        if all("of_today" in row for row in own):
            shares = [row["of_today"] for row in own]
            yield math.prod(shares) ** (1 / len(shares)), Tile(**own[0]["fields"])


SECTION = Section("tiles", "Tiles of the attention kernels, beside today's", cases)
