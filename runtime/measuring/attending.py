"""Calls of attention kernels over random keys and values in pages, to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from ...microbatch import Segments

Run = Callable[[], object]

MOST_CALLS = 64


def copies(size: float, cold: int) -> int:
    """How many inputs of so many bytes to go round, that no cache keeps one: `cold` bytes in all."""
    return max(1, min(MOST_CALLS, math.ceil(cold / size)))


def pages_of(lengths: Sequence[int], page: int) -> int:
    """Pages that requests of these lengths take."""
    return sum(-(-length // page) for length in lengths)


class Paged:
    """K and V of one rank, [KV heads, pages, page, head dim] each, of room for so many tokens."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.tokens = heads, kv_heads, dim, tokens
        self.device, self.dtype = device, dtype
        shape = (kv_heads, tokens, dim)
        self._k, self._v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        self.token_bytes = 2 * kv_heads * dim * dtype.itemsize

    @property
    def group(self) -> int:
        """Query heads on each KV head."""
        return self.heads // self.kv_heads

    def queries(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.heads, self.dim, dtype=self.dtype, device=self.device)

    def paged(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V in whole pages of so many tokens."""
        whole = self.tokens // page * page
        k, v = (torch.unflatten(x[:, :whole], 1, (-1, page)) for x in (self._k, self._v))
        return k, v

    def call(
        self,
        module: ModuleType,
        name: str,
        q: torch.Tensor,
        lengths: Sequence[int],
        page: int,
        first: int = 0,
    ) -> tuple[Run, torch.Tensor]:
        """The kernel `name` of a module, prepared, and its out, for q [N, H, d].

        Of each request the last tokens are asked, as many of each; they lie one behind the other, from page
        `first` on.
        """

        def table(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        rows = q.shape[0] // len(lengths)
        counts = [-(-length // page) for length in lengths]
        pages = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for i, count in enumerate(counts):
            pages[i, :count] = torch.arange(first, first + count)
            first += count
        given = Segments(
            table(range(0, q.shape[0] + 1, rows)),
            table(lengths),
            table([length - rows for length in lengths]),
            pages.to(self.device),
            rows,
            max(lengths),
        )
        k, v = self.paged(page)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=self.device)
        launch, attend = module.prepare(given), getattr(module, name)
        return lambda: attend(q, k, v, launch, out, lse), out

    def cold_calls(
        self, module: ModuleType, name: str, rows: int, lengths: Sequence[int], page: int, cold: int
    ) -> list[Run]:
        """The same on as many inputs as no cache of so many bytes holds, and as there is room for."""
        pages = pages_of(lengths, page)
        room = self.tokens // page // pages
        count = min(copies(sum(lengths) * self.token_bytes, cold), room)
        q = self.queries(rows * len(lengths))
        return [self.call(module, name, q, lengths, page, i * pages)[0] for i in range(count)]
