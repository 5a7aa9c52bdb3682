"""Renders the kernels of an artifact, specialised for one plan, from templates.

`render_kernels(spec)` is all there is: one `KernelSpec` decides every constant in every file. Both
targets have modules of the same names and signatures: torch kernels for `cpu`, and C for its decode,
which is compiled on the machine that runs it; Triton for `cuda:*`.
Choices of block shapes are the tables here and in `tiles`, or a cluster file's, never in the templates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..artifact import LENT
from ..errors import BadInput
from ..ir.ops.attention import LSE_BYTES, SPLIT_ROWS
from ..ir.types import DTYPE_NAMES, E4M3, ITEMSIZE, TORCH_NAMES
from ..tiles import Cut, Tile
from .rowwise import LOAD_BYTES, head_tile, row_block, row_tile, widest_tile
from .templating import render
from .tiles import TILES, Choices, Tiles

BLOCK_BYTES = 16 * 1024
"""Bytes of keys that the CPU decode works on at a time: half of a first-level cache."""

FEW_ROWS = 8
"""Rows of a matrix product that the CPU's own kernel serves; torch is faster above. Measured."""

LANES: Mapping[int, tuple[str, int]] = {16: ("__AVX512F__", 16), 8: ("__AVX__", 8), 4: ("", 8)}
"""Floats of a CPU's vectors: the macro that says so, and registers for a tile of outputs. 4: any CPU."""

FLOAT8 = TORCH_NAMES[E4M3]

_COMMON = (
    *("__init__.py", "attention_decode.py", "attention_prefill.py", "merge.py"),
    *("rms_norm.py", "rope_append.py"),
)
_FILES = {
    "cpu": {
        name: f"torch/{name}"
        for name in (
            *(*_COMMON, "linear.c", "linear.py", "merge.c", "native.py"),
            *("paging.py", "rotary.py", "swiglu.py"),
        )
    },
    "cuda": {
        **{
            name: f"triton/{name}"
            for name in (*_COMMON, "rows.py", "softmax.py", "splits.py", "swiglu.py")
        },
        "rotary.py": "torch/rotary.py",  # once a step, for all layers: not worth a kernel of its own
    },
}
_COMPILED = {"attention_decode.c": "torch/attention_decode.c"}
_ONE_SHOT = {"all_reduce.py": "triton/all_reduce.py"}
_FP8 = {name: f"triton/{name}" for name in ("quantize.py", "swiglu_fp8.py")}


@dataclass(frozen=True)
class Width:
    """The CPU decode on vectors of `lanes` floats, of processors for which `macro` is defined.

    lanes = heads × keys that are scored together; vectors: in a row of the cache
    tall × wide: heads × vectors of the output that are held in registers
    """

    macro: str
    lanes: int
    heads: int
    keys: int
    vectors: int
    tall: int
    wide: int


@dataclass(frozen=True)
class KernelSpec:
    """What the kernels of one rank are specialised for. Heads and ffn are per rank.

    merged_heads: those whose partial results it merges, of its own or of its KVP peers'
    target: "cpu" or "cuda:sm_90"; dtype: "float32", "bfloat16" or "float16", of activations and KV
    inv_freq: rotary frequencies [head_dim / 2], exact float32 values; attention_factor: scales cos and sin
    kv_dtype: of the cache: dtype, unless it says "float8_e4m3fn"; fp8: products are of 8-bit floats
    peers: of a KVP group, whose partial results it merges
    sum_ranks: of tp, whose partial sums its kernels add up themselves; 1: they do not
    """

    target: str
    dtype: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    merged_heads: int
    head_dim: int
    ffn: int
    page_size: int
    norm_eps: float
    qk_norm: bool
    inv_freq: tuple[float, ...]
    attention_factor: float
    kv_dtype: str = ""
    fp8: bool = False
    peers: int = 1
    sum_ranks: int = 1

    def __post_init__(self) -> None:
        if not self.kv_dtype:
            object.__setattr__(self, "kv_dtype", self.dtype)
        assert self.kv_dtype in (self.dtype, FLOAT8)
        assert self.target != "cpu" or self.sum_ranks == 1, "CPUs read no memory of their peers"
        assert self.target != "cpu" or not (self.fp8 or self.kv_dtype == FLOAT8), "no fp8 on CPUs"
        assert self.num_heads % self.num_kv_heads == 0, "query heads come in groups"
        assert len(self.inv_freq) * 2 == self.head_dim, "one frequency for each pair"
        assert self.dtype == "float32" or self.target != "cpu", "the CPU kernels are float32"

    @property
    def group(self) -> int:
        """Query heads on each KV head."""
        return self.num_heads // self.num_kv_heads


def render_kernels(spec: KernelSpec, tiles: Tiles | None = None) -> dict[str, str]:
    """The kernels' sources by path in the artifact ("kernels/rms_norm.py", …).

    tiles: in place of the architecture's own, for a GPU
    """
    values = {
        **vars(spec),
        "title": f"{spec.num_heads} × {spec.head_dim} query heads, hidden size {spec.hidden}",
        "group": spec.group,
        **(_cpu(spec) if spec.target == "cpu" else _triton(spec, tiles)),
    }
    files = _FILES[spec.target.partition(":")[0]]
    if values.get("compiled"):
        files = {**files, **_COMPILED}
    if spec.fp8:
        files = {**files, **_FP8}
    if spec.sum_ranks > 1:
        files = {**files, **_ONE_SHOT}
    return {f"kernels/{name}": render(f"{file}.j2", **values) for name, file in files.items()}


def _cpu(spec: KernelSpec) -> dict[str, object]:
    held = max(1, BLOCK_BYTES // (4 * spec.head_dim))
    return {
        "compiled": spec.head_dim % min(LANES) == 0,
        "block": max(n for n in range(1, held + 1) if spec.page_size % n == 0),
        "scale": spec.head_dim**-0.5,
        "widths": [_width(spec, lanes) for lanes in LANES if spec.head_dim % lanes == 0],
        "lanes": {lanes: macro for lanes, (macro, _) in LANES.items()},
        "few": FEW_ROWS,
        "tail": LSE_BYTES // 4,
    }


def _width(spec: KernelSpec, lanes: int) -> Width:
    """How the CPU decode divides its work on a processor whose vectors are of so many lanes."""
    macro, registers = LANES[lanes]
    heads = min(_power_of_two(spec.group), lanes)
    vectors = spec.head_dim // lanes
    wide = max(n for n in range(1, registers + 1) if vectors % n == 0)
    tall = max(n for n in (1, 2, 4, 8, 16) if n <= min(heads, registers // wide))
    return Width(macro, lanes, heads, lanes // heads, vectors, tall, wide)


def _triton(spec: KernelSpec, given: Tiles | None) -> dict[str, object]:
    arch = spec.target.partition(":")[2]
    if arch not in TILES:
        known = ", ".join(f"cuda:{name}" for name in TILES)
        raise BadInput("no kernels for this target", got=spec.target, do=f"use {known} or cpu")
    if arch == "sm_80" and (spec.fp8 or spec.kv_dtype == FLOAT8):
        raise BadInput("sm_80 has no 8-bit floats", where=spec.target, do="leave fp8 out")
    tiles = given or TILES[arch]
    prefill = _tile(tiles.prefill, tiles.single_prefill, spec)
    decode = _tile(tiles.decode, tiles.single_decode, spec)
    grid = {"prefill": tiles.sms * prefill.programs, "decode": tiles.sms * decode.programs}
    # What decodes may leave at the same time is theirs; the planner's memory counts both.
    slots = (SPLIT_ROWS - 2 * grid["decode"] * spec.group) // prefill.block_m
    if slots < grid["prefill"]:
        raise BadInput(
            "tiles leave no room for the partial results of split keys",
            where=spec.target,
            got=f"prefill {prefill}; decode {decode}",
            do="give them fewer programs or lanes",
        )
    return {
        "arch": arch,
        "num_sms": tiles.sms,
        **_rowwise(spec, tiles),
        "prefill": {
            **vars(prefill),
            "tile_rows": prefill.block_m // spec.group,
            "grid": grid["prefill"],
            "lent": tiles.sms // LENT * prefill.programs,
            "slots": slots,
        },
        "decode": {**vars(decode), "grid": grid["decode"]},
        "split_overhead": tiles.split_overhead,
        "shortest_blocks": max(1, tiles.shortest_run // decode.block_n),
        "scale_log2": spec.head_dim**-0.5 * math.log2(math.e),
        "ln2": math.log(2),
        "precision": ', input_precision="tf32x3"' if spec.dtype == "float32" else "",
    }


def _rowwise(spec: KernelSpec, tiles: Tiles) -> dict[str, object]:
    """How rows are cut, by the module that goes over them."""
    itemsize = ITEMSIZE[DTYPE_NAMES[spec.dtype]]
    attention, dim = spec.merged_heads * spec.head_dim, spec.head_dim

    def cut(module: str, width: int) -> Cut | None:
        return tiles.rows.get(module, {}).get(width) if itemsize == 2 else None

    return {
        "vector": LOAD_BYTES // itemsize,
        "tail": LSE_BYTES // itemsize,
        "fp8_kv": spec.kv_dtype == FLOAT8,
        "rms": row_tile(spec.hidden, itemsize, cut("rms_norm", spec.hidden)),
        "sum": widest_tile(spec.hidden, itemsize),
        "swiglu": row_block(spec.ffn, itemsize, cut("swiglu", spec.ffn)),
        "swiglu_row": row_tile(spec.ffn, itemsize, cut("swiglu_fp8", spec.ffn)),
        "quantize": row_tile(attention, itemsize, cut("quantize", attention)),
        "columns": attention,
        "rope": head_tile(dim // 2, itemsize, cut("rope_append", dim)),
        "merge": head_tile(dim, itemsize, cut("merge", dim)),
    }


def _tile(by_head_dim: Choices, single: Tile, spec: KernelSpec) -> Tile:
    """The entry for the type, head dim and page size, with room for all heads of a group."""
    largest = max(by_head_dim)
    if spec.head_dim != _power_of_two(spec.head_dim) or spec.head_dim > largest:
        raise BadInput(
            f"no CUDA kernel for a head dim that is not a power of two up to {largest}",
            where=spec.target,
            got=spec.head_dim,
            do="plan for the target cpu",
        )
    choices = next(tiles for head_dim, tiles in by_head_dim.items() if spec.head_dim <= head_dim)
    if spec.dtype == "float32":
        choices = (single,)
    tile = next(tile for tile in choices if tile.serves(spec.page_size))
    return replace(tile, block_m=max(tile.block_m, _power_of_two(spec.group)))


def _power_of_two(count: int) -> int:
    """The least power of two that holds `count`."""
    return 1 << (count - 1).bit_length()
