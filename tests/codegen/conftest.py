"""Stands in for other people's attention kernels, none of which runs on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from mnemoc.codegen.providers import PROVIDERS


class Documented:
    """Paged attention of several sequences, as the providers document it, checked as they check."""

    def __init__(self, multiple: int, empty_lse: float) -> None:
        self.multiple, self.empty_lse = multiple, empty_lse

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        starts: Any,
        lengths: Any,
        table: Any,
        scale: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [N, H, d]; k, v [pages, tokens, heads, d] → out, and log-sum-exps [H, N]."""
        assert k.shape[1] % self.multiple == 0
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v, table))
        assert starts.dtype == lengths.dtype == table.dtype == torch.int32
        group = q.shape[1] // k.shape[2]
        out, lse = torch.zeros_like(q), torch.full(q.shape[1::-1], self.empty_lse)
        for s, length in enumerate(lengths.tolist()):
            first, end = int(starts[s]), int(starts[s + 1])
            keys, values = (
                cache[table[s].long()].flatten(0, 1)[:length].double() for cache in (k, v)
            )
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            for i, row in enumerate(range(first, end)):
                seen = length - (end - first) + i + 1 if causal else length
                if seen > 0:
                    score = torch.einsum("hd,nhd->hn", q[row].double(), keys[:seen]) * scale
                    lse[:, row] = score.logsumexp(1)
                    out[row] = torch.einsum("hn,nhd->hd", score.softmax(1), values[:seen])
        return out, lse

    def flash_attn_varlen_func(
        self,
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Any:
        assert return_attn_probs
        assert softmax_scale is not None
        lengths = cu_seqlens_k.diff()
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k >= lengths.max()
        found = self.attend(q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, causal)
        return *found, None

    def flash_attn_with_kvcache(
        self,
        q: Any,
        k_cache: Any,
        v_cache: Any,
        cache_seqlens: Any = None,
        block_table: Any = None,
        page_table: Any = None,
        cu_seqlens_q: Any = None,
        max_seqlen_q: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        return_softmax_lse: bool = False,
    ) -> Any:
        """Queries [N, H, d] of different counts, or as many of each sequence: [N, rows, H, d]."""
        assert return_softmax_lse
        assert softmax_scale is not None
        table = page_table if self.multiple == 1 else block_table
        starts, packed = cu_seqlens_q, q
        if starts is None:
            starts = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)
            packed = q.flatten(0, 1)
        else:
            assert max_seqlen_q == starts.diff().max()
        out, lse = self.attend(
            packed, k_cache, v_cache, starts, cache_seqlens, table, softmax_scale, causal
        )
        if cu_seqlens_q is None:
            out, lse = out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
        return (out, lse) if self.multiple > 1 else (out, lse, None, None)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`stand_in("flash_attn")` puts a documented provider where emitted modules import it from."""

    def put(provider: str) -> None:
        empty_lse = torch.inf if provider == "flash_attn" else 7.0
        it = Documented(PROVIDERS[provider].pages or 1, empty_lse)
        made = ModuleType({"flash_attn_3": "flash_attn_interface"}.get(provider, provider))
        vars(made).update(
            flash_attn_varlen_func=it.flash_attn_varlen_func,
            flash_attn_with_kvcache=it.flash_attn_with_kvcache,
        )
        monkeypatch.setitem(sys.modules, made.__name__, made)

    return put
