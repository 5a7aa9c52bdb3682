"""KV pages in host memory: where those that were evicted wait, if bringing them back beats computing again.

Copies run on the stream that computes, and nothing waits for them: its order is the program's. What goes out
is read after every earlier micro-batch has written it and before a later one writes over it; what comes in is
there before this micro-batch reads it; and a slot is read and filled again in the same order. The host itself
never looks into a slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from ..protocol.messages import Copies
from .transfer import to_device

AT_ONCE = 16
"""Pages of a layer that are gathered on the device at a time."""

Caches = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, [heads, pages, page_size, dim]."""


class HostPages:
    """Slots for pages of one rank, each with a page of all its layers."""

    def __init__(self, kv: Caches, slots: int) -> None:
        self._kv, self._slots = kv, slots
        self._stores: list[torch.Tensor] = []

    def carry_out(self, copies: Copies) -> None:
        """Copy each (page, slot), of every layer, out to the host or back in."""
        if not self._stores:
            self._stores = [self._store(*pair) for pair in self._kv]
        for pairs in _batched(copies.pairs, AT_ONCE):
            pages = to_device(torch.tensor([page for page, _ in pairs]), self._kv[0][0].device)
            for store, (key, value) in zip(self._stores, self._kv, strict=True):
                if copies.out:
                    _out(store, key, value, pages, pairs)
                else:
                    _in(store, key, value, pages, pairs)

    def _store(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Of a layer, [slots, K and V, heads, page_size, dim]: a slot in one piece, for one transfer."""
        heads, _, page_size, dim = key.shape
        shape = (self._slots, 2, heads, page_size, dim)
        return torch.empty(shape, dtype=key.dtype, pin_memory=key.is_cuda)


def _out(
    store: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    pairs: Iterable[tuple[int, int]],
) -> None:
    gathered = torch.stack([_raw(key)[:, pages], _raw(value)[:, pages]])
    by_page = gathered.permute(2, 0, 1, 3, 4).contiguous()
    for i, (_, slot) in enumerate(pairs):
        _raw(store)[slot].copy_(by_page[i], non_blocking=True)


def _in(
    store: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
) -> None:
    shape = (len(pairs), *store.shape[1:])
    by_page = _raw(torch.empty(shape, dtype=store.dtype, device=key.device))
    for i, (_, slot) in enumerate(pairs):
        by_page[i].copy_(_raw(store)[slot], non_blocking=True)
    both = by_page.permute(1, 2, 0, 3, 4)
    _raw(key)[:, pages], _raw(value)[:, pages] = both[0], both[1]


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes: not every operation knows them."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _batched(pairs: Sequence[tuple[int, int]], size: int) -> Iterable[tuple[tuple[int, int], ...]]:
    left = iter(pairs)
    return iter(lambda: tuple(itertools.islice(left, size)), ())
