"""Loads rendered kernels, and the float64 reference that they are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from mnemoc.codegen.kernels import KernelSpec, render_kernels
from mnemoc.codegen.tiles import TILES, Tiles
from mnemoc.microbatch import Segments
from mnemoc.runtime.loader import ArtifactModules

Make = Callable[..., KernelSpec]
Load = Callable[..., ModuleType]


def make_spec(
    target: str = "cpu",
    *,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    page_size: int = 16,
    dtype: str = "float32",
    qk_norm: bool = False,
    sizes: tuple[int, int] = (96, 160),
    attention_factor: float = 1.0,
    **more: Any,
) -> KernelSpec:
    freq = torch.arange(head_dim // 2, dtype=torch.float32) * (-2 / head_dim)
    return KernelSpec(
        target=target,
        dtype=dtype,
        hidden=sizes[0],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        merged_heads=heads[0],
        head_dim=head_dim,
        ffn=sizes[1],
        page_size=page_size,
        norm_eps=1e-5,
        qk_norm=qk_norm,
        inv_freq=tuple(torch.pow(10000.0, freq).tolist()),
        attention_factor=attention_factor,
        **more,
    )


@pytest.fixture(scope="session")
def spec() -> Make:
    """`spec(target, heads=(8, 2), head_dim=64, page_size=16, …)`: a small KernelSpec."""
    return make_spec


@pytest.fixture(scope="session")
def load() -> Load:
    """`load(spec, "rms_norm", tiles=None)`: the rendered module, through the loader of the runtime."""
    loaders: dict[tuple[KernelSpec, str], ArtifactModules] = {}

    def module(spec: KernelSpec, name: str, tiles: Tiles | None = None) -> ModuleType:
        key = spec, repr(tiles)
        if key not in loaders:
            contents = {path: text.encode() for path, text in render_kernels(spec, tiles).items()}
            loaders[key] = ArtifactModules(Path("rendered"), contents, ("kernels/",))
        return loaders[key].load(f"kernels.{name}")

    return module


def device(sms: int, arch: str = "sm_90", **changes: Any) -> Tiles:
    """A GPU of few multiprocessors, which the interpreter need not run thousands of programs for."""
    return dataclasses.replace(TILES[arch], sms=sms, **changes)


@pytest.fixture(scope="session")
def kit(spec: Make, load: Load) -> SimpleNamespace:
    """What a test of attention needs: spec, load, `device`, `cut` into segments, a `case`, its `check`."""
    return SimpleNamespace(
        spec=spec, load=load, device=device, cut=segments, case=Case, check=check
    )


class Case:
    """Random queries and caches; every other segment's pages are scattered. Unused slots are NaN."""

    def __init__(self, spec: KernelSpec, cases: list[tuple[int, int, int]]) -> None:
        torch.manual_seed(0)
        longest = max(kv_len for _, kv_len, _ in cases)
        per_segment = max(1, -(-longest // spec.page_size))
        order = torch.arange(per_segment * len(cases)).view(len(cases), per_segment)
        order[1::2] = order[1::2].flip(1)
        shape = (spec.num_kv_heads, order.numel(), spec.page_size, spec.head_dim)
        dtype, kv_dtype = getattr(torch, spec.dtype), getattr(torch, spec.kv_dtype)
        self.segments = segments(cases, order)
        self.k, self.v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        for pages, (_, kv_len, _) in zip(order, cases, strict=True):
            for position in range(kv_len):
                page, at = pages[position // spec.page_size], position % spec.page_size
                self.k[:, page, at] = torch.randn(shape[0], shape[3])
                self.v[:, page, at] = torch.randn(shape[0], shape[3])
        self.k, self.v = self.k.to(kv_dtype), self.v.to(kv_dtype)
        rows = int(self.segments.rows[-1])
        self.q = torch.randn(rows, spec.num_heads, spec.head_dim).to(dtype)

    @torch.inference_mode()
    def run(self, module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.full_like(self.q, torch.nan), torch.full(self.q.shape[:2], torch.nan)
        getattr(module, name)(self.q, self.k, self.v, module.prepare(self.segments), out, lse)
        return out, lse


def check(case: Case, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, lse = reference_attention(case.q, case.k, case.v, case.segments)
    torch.testing.assert_close(found[1].double(), lse, atol=3e-6, rtol=1e-6)
    atol = 3e-6 if case.q.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found[0].double(), out, atol=atol, rtol=1e-5)


def segments(cases: Sequence[tuple[int, int, int]], pages: torch.Tensor) -> Segments:
    """Segments of (rows, kv_len, past) each, with one row of page ids each."""
    counts = torch.tensor([0, *(rows for rows, _, _ in cases)], dtype=torch.int32)
    return Segments(
        rows=counts.cumsum(0, dtype=torch.int32),
        kv_len=torch.tensor([kv_len for _, kv_len, _ in cases], dtype=torch.int32),
        past=torch.tensor([past for _, _, past in cases], dtype=torch.int32),
        pages=pages.to(torch.int32),
        max_rows=max(rows for rows, _, _ in cases),
        max_kv=max(kv_len for _, kv_len, _ in cases),
    )


def reference_attention(
    q_NHd: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, given: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of each row over the keys that it sees, a row at a time, in float64."""
    q_NHd, k_cache, v_cache = q_NHd.double(), k_cache.double(), v_cache.double()
    group = q_NHd.shape[1] // k_cache.shape[0]
    out_NHd = torch.zeros_like(q_NHd)
    lse_NH = torch.full_like(q_NHd[..., 0], -torch.inf)
    for s in range(given.count):
        pages, past = given.pages[s].long(), int(given.past[s])
        k_knd, v_knd = (cache[:, pages].flatten(1, 2) for cache in (k_cache, v_cache))
        for i, row in enumerate(range(int(given.rows[s]), int(given.rows[s + 1]))):
            seen = min(int(given.kv_len[s]), past + i + 1)
            if seen > 0:
                k_Hnd = k_knd[:, :seen].repeat_interleave(group, 0)
                v_Hnd = v_knd[:, :seen].repeat_interleave(group, 0)
                score_Hn = torch.einsum("hd,hnd->hn", q_NHd[row], k_Hnd) * q_NHd.shape[2] ** -0.5
                lse_NH[row] = score_Hn.logsumexp(1)
                out_NHd[row] = torch.einsum("hn,hnd->hd", score_Hn.softmax(1), v_Hnd)
    return out_NHd, lse_NH
