"""What two processes of one thread each reach together on this machine, over one alone.

No layout of two workers can gain more than this on what it is bound by: matrix products and attention
bind prefill, memory binds decode. The last is our own decode kernel, each process over its own KV cache:
what two KVP groups would gain if they had nothing to say to one another.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mnemoc.codegen.kernels import KernelSpec, render_kernels
from mnemoc.microbatch import Segments
from mnemoc.runtime.loader import ArtifactModules

from .harness import Figure

SECONDS = 3.0
HEADS, KV_HEADS, HEAD_DIM, DECODE_TOKENS = 64, 4, 128, 16384


def _repeat(kind: str, speeds: multiprocessing.Queue[float]) -> None:
    torch.set_num_threads(1)
    act = _KINDS[kind]()
    act()
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        act()
        times += 1
    speeds.put(times / (time.perf_counter() - started))


def _matmul() -> Callable[[], object]:
    left, right = torch.randn(256, 1024), torch.randn(1024, 1024)
    return lambda: left @ right


def _attention() -> Callable[[], object]:
    query, keys = torch.randn(1, 8, 256, 64), torch.randn(1, 8, 8192, 64)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return lambda: attend(query, keys, keys)


def _memory() -> Callable[[], object]:
    values = torch.randn(64 * 2**20)
    return values.sum


def _decode() -> Callable[[], object]:
    """Decode attention with 16 query heads on a KV head, as in `kvp`."""
    spec = KernelSpec(
        **{"target": "cpu", "dtype": "float32", "hidden": 256, "ffn": 688, "page_size": 64},
        **{"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "norm_eps": 1e-5},
        **{"merged_heads": HEADS},
        **{"qk_norm": False, "inv_freq": (1.0,) * (HEAD_DIM // 2), "attention_factor": 1.0},
    )
    contents = {path: text.encode() for path, text in render_kernels(spec).items()}
    kernel = ArtifactModules(Path("ceiling"), contents, ("kernels/",)).load(
        "kernels.attention_decode"
    )
    pages = torch.arange(DECODE_TOKENS // 64, dtype=torch.int32)[None]
    length = torch.tensor([DECODE_TOKENS], dtype=torch.int32)
    rows = torch.tensor([0, 1], dtype=torch.int32)
    plan = kernel.prepare(Segments(rows, length, length - 1, pages, 1, DECODE_TOKENS))
    keys, values = torch.randn(2, KV_HEADS, DECODE_TOKENS // 64, 64, HEAD_DIM)
    query = torch.randn(1, HEADS, HEAD_DIM)
    out, lse = torch.empty_like(query), torch.empty(1, HEADS)
    return lambda: kernel.attention_decode(query, keys, values, plan, out, lse)


_KINDS = {
    "matrix products": _matmul,
    "attention": _attention,
    "memory": _memory,
    "our decode attention": _decode,
}


def ceilings() -> list[Figure]:
    """One figure per kind of work."""
    return [_ceiling(kind) for kind in _KINDS]


def _ceiling(kind: str) -> Figure:
    context = multiprocessing.get_context("spawn")
    together = []
    for count in (1, 2):
        speeds = context.Queue()
        workers = [context.Process(target=_repeat, args=(kind, speeds)) for _ in range(count)]
        for worker in workers:
            worker.start()
        together.append(sum(speeds.get(timeout=60) for _ in workers))
        for worker in workers:
            worker.join()
    name = f"the machine: two processes over one, {kind}"
    return Figure(name, together[1] / together[0], "×", "2", "no layout, no messages")
