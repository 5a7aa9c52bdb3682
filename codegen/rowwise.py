"""How the kernels that go over rows cut them: 16 bytes a thread and load, and several loads in flight.

A kernel that needs a whole row (a norm, a row's scale) holds it in registers as tiles; one that does not
takes a block of it. Widths are no powers of two, tiles are: so they are chosen to leave few threads idle.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles import Cut

LOAD_BYTES = 16
"""What a thread loads or stores at once: the widest access there is."""

MOST_PIECES = 8
"""Tiles of a row that a thread can hold beside what it computes, in a quarter of its registers."""

IDLE = 1 / 8
"""Threads of a row's blocks that may have nothing to do: they move no bytes, and cost little else."""


@dataclass(frozen=True)
class RowTile:
    """A row as `pieces` tiles of `piece` columns, each one load of all threads of so many warps."""

    piece: int
    pieces: int
    warps: int


def row_tile(width: int, itemsize: int, cut: Cut | None = None) -> RowTile:
    """The tile of a whole row: few idle threads, then two loads a thread or as few more as eight warps need.

    More of them only cost registers, and so rows under way; more warps wait longer for one another.
    cut: what was measured to be best
    """
    if cut is not None:
        return _tile(width, itemsize, cut.warps)
    tiles = [_tile(width, itemsize, warps) for warps in (1, 2, 4, 8, 16)]
    held = [tile for tile in tiles if tile.pieces <= MOST_PIECES] or tiles[-1:]

    def badness(tile: RowTile) -> tuple[bool | int, ...]:
        idle = tile.piece * tile.pieces * (1 - IDLE) > width
        return idle, tile.pieces > 4, tile.warps > 8, tile.pieces < 2, tile.pieces

    return min(held, key=badness)


MOST_WARPS = 32
"""Of a program."""


def widest_tile(width: int, itemsize: int) -> RowTile:
    """The tile of a row that few programs have, each a multiprocessor to itself: all of its loads at once.

    What idles costs nothing there, but every load that waits for another one's registers a latency more.
    """
    tiles = [_tile(width, itemsize, warps) for warps in (1, 2, 4, 8, 16, MOST_WARPS)]
    return next((tile for tile in tiles if tile.pieces == 1), tiles[-1])


def _tile(width: int, itemsize: int, warps: int) -> RowTile:
    piece = 32 * warps * LOAD_BYTES // itemsize
    return RowTile(piece, -(-width // piece), warps)


@dataclass(frozen=True)
class Block:
    """A part of a row: `columns` by `warps`; a row has `blocks`."""

    columns: int
    blocks: int
    warps: int


def row_block(width: int, itemsize: int, cut: Cut | None = None) -> Block:
    """The largest block, of two loads a thread, that leaves few threads idle; or the smallest.

    cut: what was measured to be best
    """
    if cut is not None:
        return _block(width, itemsize, cut)
    made = [_block(width, itemsize, Cut(warps, loads=2)) for warps in (4, 2, 1)]
    few = (block for block in made if block.columns * block.blocks * (1 - IDLE) <= width)
    return next(few, made[-1])


def _block(width: int, itemsize: int, cut: Cut) -> Block:
    columns = cut.loads * 32 * cut.warps * LOAD_BYTES // itemsize
    return Block(columns, -(-width // columns), cut.warps)


@dataclass(frozen=True)
class HeadTile:
    """So many neighbouring heads of a program of so many warps."""

    heads: int
    warps: int


def head_tile(dim: int, itemsize: int, cut: Cut | None = None) -> HeadTile:
    """As many heads as give each thread of four warps one load of `dim` columns of each.

    No more, so that the few rows of decodes are many programs; what is in flight, many programs give.
    cut: what was measured to be best
    """
    cut = cut or Cut(4, loads=1)
    threads = max(1, dim * itemsize // LOAD_BYTES)
    return HeadTile(max(1, cut.loads * 32 * cut.warps // threads), cut.warps)
