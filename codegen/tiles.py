"""What kernels are tuned by, for each architecture: data, so that measurements can replace it.

A cluster file's [tiles], which `mnemoc calibrate` measures, go before (`refreshed`); nothing is tuned
while a plan serves. All figures here are derived (docs/kernels.md says how), none is measured yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..tiles import Cut, Cuts, MeasuredTiles, Tile

Choices = Mapping[int, tuple[Tile, ...]]
"""By the head dim up to which they serve: the first tile that serves the page size is taken."""


_SINGLE_PREFILL, _SINGLE_DECODE = Tile(32, 32, 8, 2), Tile(16, 32, 4, 2)


@dataclass(frozen=True)
class Tiles:
    """One architecture's. sms: multiprocessors of its data-centre GPU

    prefill, decode: of 16-bit floats, KV cache of 8 or 16 bits; the last of each choice serves any page
    single_prefill, single_decode: of float32, whose products are three of TF32 and need the registers
    split_overhead: keys that take as long as the start and end of a prefill item
    shortest_run: keys of a decode that are worth a program of their own
    rows: measured cuts of row-wise kernels of 16-bit types; `rowwise` finds those of others
    """

    sms: int
    prefill: Choices
    decode: Choices
    single_prefill: Tile = _SINGLE_PREFILL
    single_decode: Tile = _SINGLE_DECODE
    split_overhead: int = 256
    shortest_run: int = 256
    rows: Cuts = field(default_factory=dict)

    def attention(self, kernel: str) -> Choices:
        """Of one of `ATTENTION`."""
        return self.prefill if kernel == "attention_prefill" else self.decode

    def with_tile(self, kernel: str, head_dim: int, tile: Tile) -> Tiles:
        """With a tile before all others of a head dim; those stay for pages that it cannot serve."""
        choices = self.attention(kernel)
        rest = next(tiles for most, tiles in choices.items() if head_dim <= most)
        own = (tile, *(other for other in rest if other != tile))
        changed: dict[str, Any] = {
            kernel.removeprefix("attention_"): dict(sorted({**choices, head_dim: own}.items()))
        }
        return replace(self, **changed)

    def with_cut(self, module: str, width: int, cut: Cut) -> Tiles:
        """With a cut of rows of some width in place of any other."""
        return replace(self, rows={**self.rows, module: {**self.rows.get(module, {}), width: cut}})

    def refreshed(self, measured: MeasuredTiles) -> Tiles:
        """With what was measured before what was derived."""
        tiles = self
        for kernel, by_dim in measured.attention.items():
            for head_dim, tile in by_dim.items():
                if head_dim <= max(tiles.attention(kernel)):  # no kernel serves larger ones
                    tiles = tiles.with_tile(kernel, head_dim, tile)
        return replace(tiles, rows={**tiles.rows, **measured.rows})


# What limits a prefill tile are the accumulators of scores and outputs, which a warp holds in registers:
# larger ones spill (the tests compile every entry). Decode wants bytes in flight: stages × programs.
_HOPPER_PREFILL = {
    64: (
        Tile(128, 128, 8, 3, bulk=True),
        Tile(128, 64, 8, 4, bulk=True),
        Tile(128, 64, 8, 3),
    ),
    128: (Tile(128, 64, 8, 3, bulk=True), Tile(128, 64, 8, 3)),
}
_BLACKWELL_PREFILL = {
    64: (Tile(128, 64, 8, 4, bulk=True), Tile(128, 64, 8, 3)),
    128: (Tile(128, 32, 8, 4, bulk=True), Tile(128, 32, 8, 4)),
}
_HOPPER_DECODE = {
    32: (Tile(16, 64, 2, 4, 4, bulk=True), Tile(16, 64, 4, 4, 2)),
    64: (
        Tile(16, 128, 4, 4, 2, bulk=True),
        Tile(16, 64, 4, 5, 2, bulk=True),
        Tile(16, 64, 4, 4, 2),
    ),
    128: (Tile(16, 64, 4, 4, 2, bulk=True), Tile(16, 64, 4, 3, 2)),
}

TILES: Mapping[str, Tiles] = {
    "sm_80": Tiles(  # A100
        sms=108,
        prefill={
            32: (Tile(128, 32, 4, 2),),
            64: (Tile(128, 64, 8, 2),),
            128: (Tile(128, 32, 8, 3),),
        },
        decode={64: (Tile(16, 64, 4, 4, 2),), 128: (Tile(16, 32, 4, 4, 2),)},
    ),
    "sm_90": Tiles(sms=132, prefill=_HOPPER_PREFILL, decode=_HOPPER_DECODE),  # H100, H200
    "sm_100": Tiles(sms=148, prefill=_BLACKWELL_PREFILL, decode=_HOPPER_DECODE),  # B200
}


def refreshed(arch: str, measured: MeasuredTiles | None) -> Tiles:
    """An architecture's table, refreshed by what was measured on it. KeyError: there is none."""
    if measured is None or measured.arch != arch:
        return TILES[arch]
    return TILES[arch].refreshed(measured)
