"""Refuses measured tiles that do not fit their device, by what the compiled kernels say of themselves.

codegen's own tables are held to the same by its tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import BadInput
from ..tiles import ATTENTION, PIECES, WHOLE_ROWS, Cut, MeasuredTiles, Tile
from .kernels import KernelSpec


def refuse_unfit(
    kernels: Iterable[Mapping[str, Any]], spec: KernelSpec, measured: MeasuredTiles
) -> None:
    """BadInput if a kernel that a measured tile went into spills, or fits a multiprocessor too few times.

    kernels: what the report of compiling says of each
    """
    used = dict(_used(spec, measured))
    for kernel in kernels:
        module = kernel["module"].rpartition(".")[2]
        if module in used and (why := _why(kernel, used[module][1])):
            width, tile = used[module]
            raise BadInput(
                f"tiles.{module}.{width} does not fit {spec.target}: {kernel['entry']} {why}",
                got=str(tile),
                do="take it out of the cluster file, or measure again (mnemoc calibrate)",
            )


def _used(
    spec: KernelSpec, measured: MeasuredTiles
) -> Iterator[tuple[str, tuple[int, Tile | Cut]]]:
    """By module, the width and the tile that its kernels were rendered with."""
    if spec.target != f"cuda:{measured.arch}" or spec.dtype == "float32":
        return
    for kernel in ATTENTION:
        tile = measured.attention.get(kernel, {}).get(spec.head_dim)
        if tile is not None and tile.serves(spec.page_size):
            yield kernel, (spec.head_dim, tile)
    widths = dict.fromkeys(("rope_append", "merge"), spec.head_dim)
    widths |= dict.fromkeys(("swiglu", "swiglu_fp8"), spec.ffn)
    widths |= {"rms_norm": spec.hidden, "quantize": spec.merged_heads * spec.head_dim}
    for module in (*WHOLE_ROWS, *PIECES):
        cut = measured.rows.get(module, {}).get(widths[module])
        if cut is not None:
            yield module, (widths[module], cut)


def _why(kernel: Mapping[str, Any], tile: Tile | Cut) -> str | None:
    """Why a compiled kernel does not fit; None if it does."""
    if kernel["spill_bytes"]:
        return f"spills {kernel['spill_bytes']} bytes of registers a thread"
    meant = tile.programs if isinstance(tile, Tile) else 1
    fit = kernel["programs_per_sm"]
    if fit < meant:
        return (
            f"fits a multiprocessor {fit} times, not {meant}: it takes {kernel['shared_bytes']} bytes of "
            f"shared memory and {kernel['registers']} registers a thread"
        )
    return None
