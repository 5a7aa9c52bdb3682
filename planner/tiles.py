"""Reads how kernels are cut on a cluster's devices: [tiles] of its file, in place of codegen's own table.

    [tiles]
    arch = "sm_90"
    source = "measured by mnemoc calibrate on this machine"

    [tiles.attention_prefill]  # by head dim
    128 = { block_m = 128, block_n = 64, warps = 8, stages = 3, programs = 1, bulk = true }

    [tiles.rms_norm]  # by columns; of `rope_append` and `merge` by head dim
    4096 = { warps = 4 }

    [tiles.swiglu]
    14336 = { warps = 4, loads = 2 }

Whether a tile fits the device shows when its kernel is compiled, which is before a plan is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import BadInput
from ..tiles import ATTENTION, PIECES, WHOLE_ROWS, Cut, MeasuredTiles, Tile

TABLE = "tiles"
"""The key of a cluster file under which they stand."""

LARGEST: Mapping[str, int] = {"block_m": 256, "block_n": 256, "warps": 16, "loads": 8}
"""Powers of two up to these."""

MOST: Mapping[str, int] = {"stages": 16, "programs": 16}
"""Any count up to these."""

_HEADS = ("arch", "source")
T = TypeVar("T")


def read_tiles(tree: Any, target: str, where: str) -> MeasuredTiles | None:
    """The [tiles] of a cluster file for a target; None where there are none. BadInput says what is wrong."""
    if tree is None:
        return None
    known = (*_HEADS, *ATTENTION, *WHOLE_ROWS, *PIECES)
    if not isinstance(tree, dict):
        raise BadInput("[tiles] must be a table", where=where, got=tree)
    if unknown := sorted(tree.keys() - set(known)):
        do = f"known keys here: {', '.join(known)}"
        raise BadInput(f"unknown key 'tiles.{unknown[0]}'", where=where, do=do)
    for key in _HEADS:
        if not isinstance(tree.get(key), str) or not tree[key].strip():
            raise BadInput(f"tiles.{key} must be a text", where=where, got=tree.get(key))
    if target != f"cuda:{tree['arch']}":
        raise BadInput(
            f"tiles.arch is not that of the cluster's target, {target}",
            where=where,
            got=tree["arch"],
            do="measure that device, or leave [tiles] out",
        )

    def read(modules: tuple[str, ...], entry: Callable[[Any, str, str], T]) -> dict[str, Any]:
        return {m: _by_width(tree[m], f"tiles.{m}", entry, where) for m in modules if m in tree}

    rows = {**read(WHOLE_ROWS, _whole), **read(PIECES, _piece)}
    return MeasuredTiles(tree["arch"], tree["source"], read(ATTENTION, _tile), rows)


def tile_entries(tiles: MeasuredTiles) -> dict[str, object]:
    """Dotted key → value, as a cluster file has them."""
    entries: dict[str, object] = {f"{TABLE}.{key}": getattr(tiles, key) for key in _HEADS}
    measured: dict[str, Mapping[int, Tile | Cut]] = {**tiles.attention, **tiles.rows}
    for module, by_width in measured.items():
        for width, entry in by_width.items():
            fields = dataclasses.asdict(entry)
            if module in WHOLE_ROWS:
                del fields["loads"]
            entries[f"{TABLE}.{module}.{width}"] = fields
    return entries


def _by_width(
    table: Any, key: str, entry: Callable[[Any, str, str], T], where: str
) -> dict[int, T]:
    if not isinstance(table, dict) or not table:
        raise BadInput(f"{key} must be a table by width", where=where, got=table)
    for width in table:
        if not width.isdecimal() or int(width) < 1:
            raise BadInput(f"a key of {key} is not a width", where=where, got=width)
    return {int(width): entry(value, f"{key}.{width}", where) for width, value in table.items()}


def _tile(value: Any, key: str, where: str) -> Tile:
    _check(value, key, where, ("block_m", "block_n", "warps", "stages"), ("programs", "bulk"))
    tile = Tile(**value)
    if min(tile.block_m, tile.block_n) < 16:
        raise BadInput(f"{key} has a block of less than 16", where=where, got=value)
    return tile


def _whole(value: Any, key: str, where: str) -> Cut:
    _check(value, key, where, ("warps",))
    return Cut(**value)


def _piece(value: Any, key: str, where: str) -> Cut:
    _check(value, key, where, ("warps", "loads"))
    return Cut(**value)


def _check(
    value: Any, key: str, where: str, needed: tuple[str, ...], more: tuple[str, ...] = ()
) -> None:
    """A table of these keys, whose values are possible ones."""
    if not isinstance(value, dict) or not set(needed) <= value.keys() <= {*needed, *more}:
        form = ", ".join(f"{name} = ..." for name in (*needed, *more))
        raise BadInput(
            f"{key} must be a tile", where=where, got=value, do=f"write {key} = {{ {form} }}"
        )
    for name, given in value.items():
        if name == "bulk":
            right, form = isinstance(given, bool), "true or false"
        elif name in LARGEST:
            right = type(given) is int and 1 <= given <= LARGEST[name] and given & (given - 1) == 0
            form = f"a power of two up to {LARGEST[name]}"
        else:
            right = type(given) is int and 1 <= given <= MOST[name]
            form = f"1 to {MOST[name]}"
        if not right:
            raise BadInput(f"{name} of {key} is not {form}", where=where, got=given)
