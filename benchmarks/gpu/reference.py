"""Attention and the row-wise kernels in float64, from their definitions; and what counts as wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mnemoc.microbatch import Segments

SCORES = 1 << 25
"""Float64 scores held at a time: 256 MB."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; NaN where anything found is not a number."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-300))


def attention(
    q_NHd: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, given: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of each row over the keys that it sees: none give 0 and −inf."""
    group = q_NHd.shape[1] // k_cache.shape[0]
    out_NHd = torch.zeros_like(q_NHd, dtype=torch.float64)
    lse_NH = torch.full_like(out_NHd[..., 0], -torch.inf)
    rows, kv_len, past = (x.tolist() for x in (given.rows, given.kv_len, given.past))
    for s in range(given.count):
        pages = given.pages[s].long()[: -(-kv_len[s] // k_cache.shape[2])]
        if not kv_len[s]:
            continue
        step = max(1, SCORES // (kv_len[s] * group))
        for first in range(rows[s], rows[s + 1], step):
            last = min(first + step, rows[s + 1])
            row = torch.arange(first - rows[s], last - rows[s], device=q_NHd.device)
            seen = (past[s] + row + 1).clamp(0, kv_len[s])
            key = torch.arange(kv_len[s], device=q_NHd.device)
            hidden = key[None, :] >= seen[:, None]
            for head in range(k_cache.shape[0]):
                k_nd, v_nd = (
                    _taken(cache[head], pages)[: kv_len[s]].double() for cache in (k_cache, v_cache)
                )
                own = slice(head * group, (head + 1) * group)
                q_rgd = q_NHd[first:last, own].double()
                score = torch.einsum("rgd,nd->rgn", q_rgd, k_nd) * q_NHd.shape[2] ** -0.5
                score.masked_fill_(hidden[:, None], -torch.inf)
                lse = score.logsumexp(2)
                weight = (score - lse.nan_to_num(neginf=0.0)[..., None]).exp()
                out_NHd[first:last, own] = torch.einsum("rgn,nd->rgd", weight, v_nd)
                lse_NH[first:last, own] = lse
    return out_NHd, lse_NH


def _taken(pages_Ppd: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Tokens of the chosen pages, [tokens, d]; 8-bit floats are indexed as bytes."""
    bits = pages_Ppd.view(torch.uint8) if pages_Ppd.itemsize == 1 else pages_Ppd
    return bits[chosen].flatten(0, 1).view(pages_Ppd.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.double(), (x.shape[-1],), weight.double(), eps)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=1)
    return F.silu(gate) * up


def rotated(x_Thd: torch.Tensor, rot_T2h: torch.Tensor) -> torch.Tensor:
    """x·cos + rotate_half(x)·sin, as the models define it."""
    cos, sin = (x.double().repeat(1, 2)[:, None] for x in rot_T2h.unbind(1))
    a, b = x_Thd.double().chunk(2, dim=2)
    return x_Thd.double() * cos + torch.cat((-b, a), dim=2) * sin


def merged(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results [n, N, H, d] and [n, N, H] by online softmax: out [N, H, d], lse [N, H]."""
    weight = lses.double().softmax(0).nan_to_num(0.0)
    return (outs.double() * weight[..., None]).sum(0), lses.double().logsumexp(0)
