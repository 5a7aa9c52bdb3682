"""Loads rendered kernels, and the float64 reference that they are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mnemoc.artifact import Segments
from mnemoc.codegen.kernels import KernelSpec, render_kernels
from mnemoc.runtime.loader import ArtifactModules

Make = Callable[..., KernelSpec]
Load = Callable[[KernelSpec, str], ModuleType]


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
) -> KernelSpec:
    freq = torch.arange(head_dim // 2, dtype=torch.float32) * (-2 / head_dim)
    return KernelSpec(
        target=target,
        dtype=dtype,
        hidden=sizes[0],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        ffn=sizes[1],
        page_size=page_size,
        norm_eps=1e-5,
        qk_norm=qk_norm,
        inv_freq=tuple(torch.pow(10000.0, freq).tolist()),
        attention_factor=attention_factor,
    )


@pytest.fixture(scope="session")
def spec() -> Make:
    """`spec(target, heads=(8, 2), head_dim=64, page_size=16, …)`: a small KernelSpec."""
    return make_spec


@pytest.fixture(scope="session")
def load() -> Load:
    """`load(spec, "rms_norm")`: the rendered module, through the loader of the runtime."""
    loaders: dict[KernelSpec, ArtifactModules] = {}

    def module(spec: KernelSpec, name: str) -> ModuleType:
        if spec not in loaders:
            contents = {path: text.encode() for path, text in render_kernels(spec).items()}
            loaders[spec] = ArtifactModules(Path("rendered"), contents, ("kernels/",))
        return loaders[spec].load(f"kernels.{name}")

    return module


@pytest.fixture(scope="session")
def kit(spec: Make, load: Load) -> SimpleNamespace:
    """What a test of attention needs: spec, load, `cut` into segments, and `attend`, the reference."""
    return SimpleNamespace(spec=spec, load=load, cut=segments, attend=reference_attention)


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
