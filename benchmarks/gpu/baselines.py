"""Others' attention, on the same random K and V: what a plan's kernels are held against.

All of them get K and V contiguous, request by request, their best case; ours reads scattered pages. One whose
contract does not fit is listed with the reason, not dropped. `causal` says whether it computes the very same
function (the chunk causal behind its past) or, at best, all pairs: then its rate is of all those pairs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .device import Device, is_fatal


@dataclass(frozen=True)
class Attention:
    """q [R, H, c, d] over k, v [R, KV heads, n, d], the last c of whose n tokens are q's own."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def chunk(self) -> int:
        return self.q.shape[2]

    @property
    def tokens(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True)
class Contender:
    """run: returns out [R, H, c, d]; causal: whether it leaves masked pairs out."""

    run: Callable[[], torch.Tensor]
    causal: bool = True


Make = Callable[[Device, Attention], Contender]


def makers(*, flex: bool) -> dict[str, Make]:
    """The baselines by name. flex: with flex_attention, which compiles for each shape."""
    return {
        "SDPA flash": _flash,
        "cuDNN": _cudnn,
        **({"flex_attention": _flex} if flex else {}),
        "flash_attn 2": _flash_attn,
        "flash_attn 3": _flash_attn_3,
    }


def attempt(device: Device, make: Make, given: Attention) -> Contender | str:
    """The baseline, having run once; or why it does not."""
    try:
        contender = make(device, given)
        contender.run()
        device.synchronize()
    except (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        if is_fatal(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return contender


def _flash(device: Device, given: Attention) -> Contender:
    """PyTorch's flash attention; causal by the lower right corner, as FlashAttention-2 is."""
    q, k, v = given.q, given.k, given.v
    causal = given.chunk > 1
    if device.rehearsal:  # the CPU's op is causal by the upper left, and has no groups
        return _sdpa(given, SDPBackend.MATH)
    op = torch.ops.aten._scaled_dot_product_flash_attention
    return Contender(lambda: op(q, k, v, 0.0, causal, False)[0])


def _cudnn(device: Device, given: Attention) -> Contender:
    backend = SDPBackend.MATH if device.rehearsal else SDPBackend.CUDNN_ATTENTION
    return _sdpa(given, backend)


def _sdpa(given: Attention, backend: SDPBackend) -> Contender:
    """All pairs: PyTorch's `is_causal` goes by the upper left corner, which is no chunk behind a past.
    So heads that share keys may stand as rows of one head, and need no support of groups.
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    k, v = given.k, given.v
    q = torch.unflatten(given.q, 1, (k.shape[1], -1)).flatten(2, 3)

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v).view(given.q.shape)

    return Contender(run, causal=given.chunk == 1)


FLEX_BLOCK = 128


def _flex(device: Device, given: Attention) -> Contender:
    """Compiled for the shape; the block mask is written down rather than found by evaluating the mask."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    past, chunk, tokens = given.tokens - given.chunk, given.chunk, given.tokens

    def mask(b: Any, h: Any, row: Any, key: Any) -> Any:
        return key <= row + past

    blocks = flex_blocks(chunk, tokens)
    tensors = [_block_tensor(device, rows, -(-tokens // FLEX_BLOCK)) for rows in blocks]
    (partial_num, partial), (full_num, full) = tensors
    block_mask = flex.BlockMask.from_kv_blocks(
        partial_num,
        partial,
        full_num,
        full,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask,
        seq_lengths=(chunk, tokens),
    )
    attend = device.compile(flex.flex_attention)
    q, k, v = given.q, given.k, given.v
    return Contender(lambda: attend(q, k, v, block_mask=block_mask, enable_gqa=True))


def flex_blocks(chunk: int, tokens: int) -> tuple[list[range], list[range]]:
    """For each block of rows, the blocks of keys that some of its rows see in part, and those seen whole."""
    partial, full = [], []
    for first in range(0, chunk, FLEX_BLOCK):
        last = min(first + FLEX_BLOCK, chunk) - 1
        seen_by_all, seen_by_some = tokens - chunk + first + 1, tokens - chunk + last + 1
        whole = seen_by_all // FLEX_BLOCK
        full.append(range(whole))
        partial.append(range(whole, -(-seen_by_some // FLEX_BLOCK)))
    return partial, full


def _block_tensor(
    device: Device, rows: list[range], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, 1, rows] and indices [1, 1, rows, width] of blocks."""
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    index = torch.zeros(len(rows), width, dtype=torch.int32)
    for into, row in zip(index, rows, strict=True):
        into[: len(row)] = torch.arange(row.start, row.stop)
    return count.to(device.place)[None, None], index.to(device.place)[None, None]


def _flash_attn(device: Device, given: Attention) -> Contender:
    return _of_package(given, "flash_attn")


def _flash_attn_3(device: Device, given: Attention) -> Contender:
    return _of_package(given, "flash_attn_interface")


def _of_package(given: Attention, name: str) -> Contender:
    """Dao's packages, [R, c, H, d]; with one row, by the function that splits keys."""
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{name} is not installed")
    package = importlib.import_module(name)
    q, k, v = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
    if given.chunk == 1:
        return Contender(lambda: _out(package.flash_attn_with_kvcache(q, k, v)))
    return Contender(lambda: _out(package.flash_attn_func(q, k, v, causal=True)))


def _out(result: Any) -> torch.Tensor:
    """FlashAttention-3 may return the log-sum-exp too."""
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out.transpose(1, 2)
