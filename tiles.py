"""How kernels are cut into programs: what codegen's tables hold, and what a cluster file may hold instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

ATTENTION = ("attention_prefill", "attention_decode")
"""Kernels that are cut into lanes × keys, by a `Tile`."""

WHOLE_ROWS = ("rms_norm", "quantize", "swiglu_fp8")
"""Modules of which a program holds a whole row: its warps decide the rest."""

PIECES = ("swiglu", "rope_append", "merge")
"""Modules of which a program takes what its warps load, so many times each: part of a row, or some heads."""


@dataclass(frozen=True)
class Tile:
    """The block of a program: lanes × keys, the warps that share it, and blocks of keys in flight.

    programs: that a multiprocessor is meant to hold at a time
    bulk: keys come by the copy engine, a block of one page at a time
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int = 1
    bulk: bool = False

    def serves(self, page_size: int) -> bool:
        return not self.bulk or page_size % self.block_n == 0

    def __str__(self) -> str:
        how = "bulk" if self.bulk else "pointers"
        return (
            f"{self.block_m} × {self.block_n}, {self.warps} warps, {self.stages} stages, "
            f"{self.programs} programs, {how}"
        )


@dataclass(frozen=True)
class Cut:
    """The warps of a program, and how often each thread of it loads 16 bytes.

    loads: 0 of WHOLE_ROWS, whose width and warps say it
    """

    warps: int
    loads: int = 0

    def __str__(self) -> str:
        return f"{self.warps} warps" + (f", {self.loads} loads" if self.loads else "")


Cuts: TypeAlias = Mapping[str, Mapping[int, Cut]]
"""By module, then by width: columns of a row; the head dim of `rope_append` and `merge`."""


@dataclass(frozen=True)
class MeasuredTiles:
    """What goes before codegen's own on one architecture ("sm_90"). Of 16-bit types.

    attention: by kernel, then by head dim
    """

    arch: str
    source: str
    attention: Mapping[str, Mapping[int, Tile]]
    rows: Cuts
