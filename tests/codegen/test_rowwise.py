"""How rows are cut: each covered, few threads idle, 16 bytes a load, for the widths of all models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.codegen.rowwise import IDLE, LOAD_BYTES, head_tile, row_block, row_tile

WIDTHS = (2368, 3584, 4096, 4736, 5120, 6656, 8192, 12288, 14336, 16384, 18944, 25600, 28672)


@given(st.integers(1, 60_000), st.sampled_from([2, 4]))
def test_tiles_and_blocks_cover_a_row_with_whole_loads(width: int, itemsize: int) -> None:
    tile, block = row_tile(width, itemsize), row_block(width, itemsize)
    assert tile.piece * (tile.pieces - 1) < width <= tile.piece * tile.pieces
    assert block.columns * (block.blocks - 1) < width <= block.columns * block.blocks
    assert tile.piece * itemsize == 32 * tile.warps * LOAD_BYTES
    assert block.columns * itemsize == 2 * 32 * block.warps * LOAD_BYTES


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_models_leave_few_threads_idle_and_fit_in_registers(width: int) -> None:
    tile, block = row_tile(width, 2), row_block(width, 2)
    for whole in (tile.piece * tile.pieces, block.columns * block.blocks):
        assert whole * (1 - IDLE) <= width
    assert 2 <= tile.pieces <= 8


def test_a_program_of_heads_is_four_warps() -> None:
    assert [head_tile(dim, 2).heads for dim in (16, 64, 128)] == [64, 16, 8]
    assert head_tile(128, 4).heads == 4
