"""What two processes of one thread each reach together on this machine, over one alone.

No layout of two workers can gain more than this on what it is bound by: matrix products and attention
bind prefill, memory binds decode.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

import torch
from harness import Figure

SECONDS = 3.0


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


_KINDS = {"matrix products": _matmul, "attention": _attention, "memory": _memory}


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
        together.append(sum(speeds.get() for _ in workers))
        for worker in workers:
            worker.join()
    name = f"the machine: two processes over one, {kind}"
    return Figure(name, together[1] / together[0], "×", "2", "nothing of ours")
