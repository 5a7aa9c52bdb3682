"""What kernels are tuned by, for each architecture: data, so that measurements can replace it.

`render_kernels(spec, tiles=...)` takes another table; nothing is tuned while a plan serves. All figures
here are derived (docs/kernels.md says how), none is measured yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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


Choices = Mapping[int, tuple[Tile, ...]]
"""By the head dim up to which they serve: the first tile that serves the page size is taken."""


@dataclass(frozen=True)
class Tiles:
    """One architecture's. sms: multiprocessors of its data-centre GPU

    prefill, decode: of 16-bit floats, KV cache of 8 or 16 bits; the last of each choice serves any page
    single_prefill, single_decode: of float32, whose products are three of TF32 and need the registers
    split_overhead: keys that take as long as the start and end of a prefill item
    shortest_run: keys of a decode that are worth a program of their own
    """

    sms: int
    prefill: Choices
    decode: Choices
    single_prefill: Tile = Tile(32, 32, 8, 2)
    single_decode: Tile = Tile(16, 32, 4, 2)
    split_overhead: int = 256
    shortest_run: int = 256


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
