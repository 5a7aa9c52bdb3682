"""Calls of the row-wise kernels on random data, to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from .attending import Run, copies


@dataclass(frozen=True)
class RowShape:
    """width: of what goes over columns; heads, kv_heads, dim, page, peers: of RoPE and the merge."""

    width: int
    heads: int
    kv_heads: int
    dim: int
    page: int
    peers: int


class Rows:
    """Data of so many rows. `element`: bytes of one of their numbers."""

    def __init__(
        self, shape: RowShape, rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape, self.rows, self.device, self.dtype = shape, rows, device, dtype

    def cold_calls(self, name: str, module: ModuleType, cold: int) -> list[Run]:
        """Calls of a module's kernel on as many inputs as no cache of so many bytes holds."""
        make, tensors = CALLS[name]
        moved = self.rows * self.shape.width * self.dtype.itemsize * tensors
        return [make(self, module) for _ in range(copies(moved, cold))]

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def partial(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial results of attention: out [T, H, d], and log-sum-exps [T, H]."""
        lse = torch.randn(self.rows, self.shape.heads, device=self.device)
        return self.randn(self.rows, self.shape.heads, self.shape.dim), lse


def _add_rms_norm(given: Rows, module: ModuleType) -> Run:
    width = given.shape.width
    x, residual = given.randn(given.rows, width), given.randn(given.rows, width)
    weight = given.randn(width)
    return lambda: module.add_rms_norm(x, residual, weight)


def _swiglu(given: Rows, module: ModuleType) -> Run:
    gate_up = given.randn(given.rows, 2 * given.shape.width)
    return lambda: module.swiglu(gate_up)


def _swiglu_fp8(given: Rows, module: ModuleType) -> Run:
    gate_up = given.randn(given.rows, 2 * given.shape.width)
    return lambda: module.swiglu_fp8(gate_up)


def _quantize(given: Rows, module: ModuleType) -> Run:
    x = given.randn(given.rows, given.shape.width)
    return lambda: module.quantize_fp8(x)


def _rope_append(given: Rows, module: ModuleType) -> Run:
    shape, rows = given.shape, given.rows
    qkv = given.randn(rows, (shape.heads + 2 * shape.kv_heads) * shape.dim)
    rot = torch.randn(rows, shape.dim, device=given.device)
    pages = -(-rows // shape.page)
    k, v = (given.randn(shape.kv_heads, pages, shape.page, shape.dim) for _ in range(2))
    slots = torch.arange(rows, device=given.device)
    return lambda: module.rope_append(qkv, rot, k, v, slots)


def _merge(given: Rows, module: ModuleType) -> Run:
    """Every row has a part of every peer."""
    peers, rows = given.shape.peers, given.rows
    out, lse = given.partial()
    every = torch.arange(rows, device=given.device)
    theirs = torch.cat([module.pack(*given.partial(), every) for _ in range(peers)])
    places = torch.arange(peers * rows, device=given.device).view(peers, rows).t()
    table = places.to(torch.int32).contiguous()
    return lambda: module.merge(out, lse, theirs, table)


CALLS: Mapping[str, tuple[Callable[[Rows, ModuleType], Run], int]] = {
    "rms_norm": (_add_rms_norm, 4),
    "swiglu": (_swiglu, 3),
    "swiglu_fp8": (_swiglu_fp8, 2),
    "quantize": (_quantize, 1),
    "rope_append": (_rope_append, 2),
    "merge": (_merge, 2),
}
"""By module: a call of its kernel, and how often its widths are read or written, at least."""
