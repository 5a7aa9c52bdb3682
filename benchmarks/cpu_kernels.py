"""How fast the CPU's own kernels draw memory: decode attention and products of few rows, in GB/s.

Beside each: torch on the same data, and a reduction over it, which does nothing but read. Medians of
interleaved runs on one thread, over more memory than any cache holds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as workers have it

import torch
import torch.nn.functional as F
from mnemoc.codegen.kernels import KernelSpec, render_kernels
from mnemoc.microbatch import Segments
from mnemoc.runtime.loader import ArtifactModules

from .harness import Figure, say, write_report

BYTES = 256 << 20
PAGE = 64
REPEATS = 7


def modules(group: int, dim: int) -> ArtifactModules:
    """The kernels of a rank with two KV heads."""
    spec = KernelSpec(
        **{"target": "cpu", "dtype": "float32", "hidden": 256, "ffn": 688, "page_size": PAGE},
        **{"num_heads": 2 * group, "num_kv_heads": 2, "merged_heads": 2 * group, "head_dim": dim},
        **{"norm_eps": 1e-5, "qk_norm": False, "inv_freq": (1.0,) * (dim // 2)},
        attention_factor=1.0,
    )
    contents = {path: text.encode() for path, text in render_kernels(spec).items()}
    return ArtifactModules(Path("cpu_kernels"), contents, ("kernels/",))


def decode(group: int, dim: int) -> Figure:
    """One sequence over two KV heads, `group` query heads on each."""
    kernel = modules(group, dim).load("kernels.attention_decode")
    pages = BYTES // (2 * 2 * PAGE * dim * 4)
    keys, values = torch.randn(2, 2, pages, PAGE, dim)
    tokens = pages * PAGE
    length = torch.tensor([tokens], dtype=torch.int32)
    table = torch.arange(pages, dtype=torch.int32)[None]
    rows = torch.tensor([0, 1], dtype=torch.int32)
    plan = kernel.prepare(Segments(rows, length, length - 1, table, 1, tokens))
    query = torch.randn(1, 2 * group, dim)
    out, lse = torch.empty_like(query), torch.empty(1, 2 * group)
    grouped = query.view(1, 2, group, dim)
    flat = [cache.view(1, 2, tokens, dim) for cache in (keys, values)]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    speeds = measure(
        {
            "ours": lambda: kernel.attention_decode(query, keys, values, plan, out, lse),
            "torch": lambda: flash(grouped, *flat),
            "read": lambda: (keys.amax(), values.amax()),
        }
    )
    return figure(f"decode attention, group of {group}, head dim {dim}", speeds)


def product(rows: int, width: int) -> Figure:
    """Square weights, swept in turn, for a few rows."""
    linear = modules(1, 64).load("kernels.linear").linear
    weights = torch.randn(BYTES // (4 * width * width), width, width)
    x = torch.randn(rows, width)
    speeds = measure(
        {
            "ours": lambda: [linear(x, weight) for weight in weights],
            "torch": lambda: [F.linear(x, weight) for weight in weights],
            "read": lambda: [weight.amax() for weight in weights],
        }
    )
    return figure(f"products, {rows} row{'s' if rows > 1 else ''} of {width}", speeds)


@torch.inference_mode()
def measure(contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """GB/s of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(-1, REPEATS):
        for name, act in contenders.items():
            started = time.perf_counter()
            act()
            if repeat >= 0:
                times[name].append(time.perf_counter() - started)
    return {name: BYTES / statistics.median(seconds) / 1e9 for name, seconds in times.items()}


def figure(name: str, speeds: Mapping[str, float]) -> Figure:
    detail = ", ".join(f"{who} {speed:.1f} GB/s" for who, speed in speeds.items())
    return Figure(name, 100 * speeds["ours"] / speeds["read"], "% of a read", "near 100", detail)


def main() -> None:
    torch.set_num_threads(1)
    shapes = ((1, 64), (2, 64), (4, 64), (8, 64), (1, 128), (4, 128), (8, 128))
    figures = [decode(group, dim) for group, dim in shapes]
    figures += [product(rows, width) for width in (512, 4096) for rows in (1, 2, 4, 8)]
    for line in figures:
        say(f"{line.name}: {line.value:.0f} %; {line.detail}")
    write_report("cpu_kernels", "The CPU's own kernels", figures, {})


if __name__ == "__main__":
    main()
