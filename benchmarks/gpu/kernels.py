"""The emitted kernels, rendered for one shape and loaded as the runtime loads them; caches; segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mnemoc.codegen.kernels import KernelSpec, render_kernels
from mnemoc.microbatch import Segments
from mnemoc.runtime.loader import ArtifactModules

from .device import Device, Run
from .work import Heads

PAGE = 64
"""Tokens of a page, as the planner chooses for contexts of this length."""

FP8 = torch.float8_e4m3fn


def kernel_spec(
    target: str,
    heads: Heads,
    dtype: torch.dtype,
    *,
    kv_dtype: torch.dtype | None = None,
    page: int = PAGE,
    hidden: int = 4096,
    ffn: int = 14336,
    qk_norm: bool = False,
    fp8: bool = False,
    peers: int = 1,
    sum_ranks: int = 1,
) -> KernelSpec:
    """What kernels of these heads are specialised for; kv_dtype: dtype, unless the cache is in fp8."""
    values: dict[str, Any] = {
        "target": target,
        "dtype": type_name(dtype),
        "kv_dtype": type_name(kv_dtype or dtype),
        "hidden": hidden,
        "num_heads": heads.query,
        "num_kv_heads": heads.kv,
        "merged_heads": heads.query,
        "head_dim": heads.dim,
        "ffn": ffn,
        "page_size": page,
        "norm_eps": 1e-5,
        "qk_norm": qk_norm,
        "inv_freq": tuple(1e4 ** (-2 * i / heads.dim) for i in range(heads.dim // 2)),
        "attention_factor": 1.0,
        "fp8": fp8,
        "peers": peers,
        "sum_ranks": sum_ranks,
    }
    return KernelSpec(**values)


def has_fp8(target: str) -> bool:
    """Whether the architecture has 8-bit floats."""
    return target != "cuda:sm_80"


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Kernels:
    """Modules of rendered kernels by shape, each rendered and compiled once.

    options: as `render_kernels` takes them, where a call gives none
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._loaders: dict[str, ArtifactModules] = {}

    def load(self, spec: KernelSpec, name: str, **options: Any) -> ModuleType:
        """The module `kernels/<name>.py`; options: as `render_kernels` takes them."""
        options = self._options | options
        key = repr((spec, sorted(options.items())))
        if key not in self._loaders:
            contents = {p: text.encode() for p, text in render_kernels(spec, **options).items()}
            folder = Path(f"rendered-{len(self._loaders)}")
            self._loaders[key] = ArtifactModules(folder, contents, ("kernels/",))
        return self._loaders[key].load(f"kernels.{name}")


@dataclass(frozen=True)
class Cache:
    """Paged K and V, [KV heads, pages, page size, head dim] each, filled with random values."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def page(self) -> int:
        return self.k.shape[2]

    @property
    def tokens(self) -> int:
        return self.k.shape[1] * self.k.shape[2]

    def contiguous(self, first_page: int, requests: int, tokens: int) -> list[torch.Tensor]:
        """K and V of requests whose pages lie one behind the other, [R, KV heads, n, d] each."""
        each = -(-tokens // self.page)
        found = []
        for cache in (self.k, self.v):
            pages = cache[:, first_page : first_page + requests * each]
            per_request = torch.unflatten(pages, 1, (requests, each)).flatten(2, 3)
            found.append(per_request.transpose(0, 1)[:, :, :tokens])
        return found


class Pool:
    """One large random buffer for K and one for V, viewed in any shape: drawing gigabytes takes time."""

    def __init__(self, device: Device, tokens_bytes: int) -> None:
        """tokens_bytes: of K and V together."""
        self._size = tokens_bytes // 4
        self._flat = [
            torch.randn(self._size, dtype=device.dtype, device=device.place) for _ in range(2)
        ]
        self._fp8: list[torch.Tensor] | None = None

    def cache(self, heads: Heads, dtype: torch.dtype, page: int = PAGE) -> Cache:
        """As many whole pages as there is room for."""
        per_page = heads.kv * page * heads.dim
        flat = self._flat
        if dtype == FP8:
            if self._fp8 is None:
                self._fp8 = [_quantised(x) for x in self._flat]
            flat = self._fp8
        pages = self._size // per_page
        shape = (heads.kv, pages, page, heads.dim)
        k, v = (x[: pages * per_page].view(shape) for x in flat)
        return Cache(k, v)


def _quantised(x: torch.Tensor, piece: int = 1 << 28) -> torch.Tensor:
    """As e4m3, piece by piece: the conversion takes room of its own."""
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    for at in range(0, x.numel(), piece):
        out[at : at + piece] = x[at : at + piece].to(FP8)
    return out


def segments(
    device: Device, cases: Sequence[tuple[int, int, int]], tables: torch.Tensor
) -> Segments:
    """Segments of (rows, kv_len, past) each; tables: page ids [S, P]."""

    def table(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device.place)

    offsets = [0]
    for rows, _, _ in cases:
        offsets.append(offsets[-1] + rows)
    values: Mapping[str, Any] = {
        "rows": table(offsets),
        "kv_len": table([kv_len for _, kv_len, _ in cases]),
        "past": table([past for _, _, past in cases]),
        "pages": tables.to(device.place, torch.int32),
        "max_rows": max(rows for rows, _, _ in cases),
        "max_kv": max(kv_len for _, kv_len, _ in cases),
    }
    return Segments(**values)


def attention(
    module: ModuleType,
    name: str,
    cache: Cache,
    given: Segments,
    q: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[Run, torch.Tensor, torch.Tensor]:
    """A call of `attention_prefill` or `attention_decode`, prepared, with its out and lse."""
    out = torch.empty_like(q) if out is None else out
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    function, launch = getattr(module, name), module.prepare(given)
    return lambda: function(q, cache.k, cache.v, launch, out, lse), out, lse
