"""Attention over a KV cache that is sharded along the sequence, and the merge of its parts.

`attend` is one op that yields (out, lse) over the local KV shard; `merge` combines the partial
results of the KVP groups by online softmax, and `merge_scatter` does so with each group a share of
the heads. `exchange` (and `exchange_scatter`) send partial results on their way, and who merges them waits:

    m = max_j lse_j ;  w_j = exp(lse_j − m) ;  out = Σ_j w_j·out_j / Σ_j w_j ;  lse = m + log Σ_j w_j

Legend: T rows, H query heads, G KV heads, d head dim; all per rank where work is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..graph import Op
from ..sizes import KD, KV, QK, Size, T, X, any_of, normal
from ..types import E4M3, PRODUCT, Partial, TensorType, degree
from .base import (
    Array,
    Attrs,
    OpDef,
    Rank,
    Site,
    Types,
    Work,
    integer,
    memory_work,
    no_work,
    number,
    require,
)
from .dense import complete, norm
from .e4m3 import nearest

Mesh = Mapping[str, int]

SPLIT_ROWS = 76_000
"""Partial results (one head of one row each) that a kernel which splits its keys may hold at a time."""

LSE_BYTES = 16
"""Behind each head of a partial result that travels: its lse, in float32, and what aligns the next head."""


# ------------------------------------------------------------------------------------- type rules


def infer_rope(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    x, rot = types
    complete(x)
    require(x.shape[2] == 2 * rot.shape[2], f"{rot} does not rotate {x}")
    return (x,)


def infer_append(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    kv, k, v = types
    complete(k, v)
    require(k == v, f"keys and values differ: {k} and {v}")
    require(kv.shape[2:] == k.shape[1:], f"{k} does not fit the cache {kv}")
    require(kv.axes[2:] == k.axes[1:], f"{k} is not sharded like the cache {kv}")
    return (kv,)


def infer_attend(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    q, kv = types
    complete(q)
    require(q.axes[1] == kv.axes[2], f"heads of {q} and {kv} are sharded differently")
    heads, kv_heads = q.shape[1], kv.shape[2]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    require(heads % kv_heads == 0, f"{kv_heads} KV heads do not divide {heads} query heads")
    partial = Partial("lse", kv.axes[0]) if kv.axes[0] else None
    return (
        dataclasses.replace(q, partial=partial),
        TensorType("f32", q.shape[:2], q.axes[:2], partial),
    )


def infer_exchange(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    out, lse = types
    axis = str(attrs["axis"])
    here = Partial("lse", axis)
    require(out.partial == lse.partial == here, f"nothing to send over {axis}: {out}")
    away = Partial("sent", axis)
    return dataclasses.replace(out, partial=away), dataclasses.replace(lse, partial=away)


def infer_merge(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    out, lse = types
    axis = str(attrs["axis"])
    wanted = Partial("lse", axis), Partial("sent", axis)
    require(
        out.partial == lse.partial and out.partial in wanted, f"nothing to merge over {axis}: {out}"
    )
    return dataclasses.replace(out, partial=None), dataclasses.replace(lse, partial=None)


def infer_merge_scatter(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    out, lse = infer_merge(types, attrs, mesh)
    heads, axis = out.shape[1], out.axes[1]
    require(attrs["axis"] == "kvp", "heads are scattered over kvp alone, within a tp rank's")
    require(axis == "tp" or (axis is None and mesh["tp"] == 1), f"heads of {out} are not over tp")
    ranks = degree(PRODUCT, mesh)
    require(heads % ranks == 0, f"{ranks} ranks do not divide the heads of {out}")
    return tuple(
        dataclasses.replace(value, axes=(value.axes[0], PRODUCT, *value.axes[2:]))
        for value in (out, lse)
    )


def infer_rope_append(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    qkv, _, kv = types[:3]
    complete(qkv)
    heads, kv_heads, dim = integer(attrs, "heads"), kv.shape[2], kv.shape[3]
    assert isinstance(kv_heads, int) and isinstance(dim, int)
    require(qkv.shape[1] == (heads + 2 * kv_heads) * dim, f"{qkv} is not q, k, v of {kv}")
    require(qkv.axes[1] == kv.axes[2], f"{qkv} is not sharded like {kv}")
    return (TensorType(qkv.dtype, (qkv.shape[0], heads, dim), (None, qkv.axes[1], None)), kv)


# ------------------------------------------------------------------------------------------- work


def attend_work(site: Site) -> tuple[Work, ...]:
    """Prefill and decode apart, for different kernels serve them.

    flops = 4·d per query–key pair and query head (two products); bytes = K and V of the cached
    tokens once, queries and outputs once. Prefill grows faster with the rows that share a KV head's
    keys: c·H/G of a chunk of c, and QK/c is about KV, so the grain, flops/(c·H/G), is 4·KV·G·d.
    Decode grows faster with the bytes that it reads. Of two halves each has half of the pairs and reads all
    keys; decodes are in the first.
    """
    q, kv = site.operands
    share, later = _share(q), site.op.attrs.get("half") == 1
    _, heads, dim = q.local_shape(site.mesh)
    kv_heads = kv.local_shape(site.mesh)[2]
    token_bytes = 2 * kv_heads * dim * kv.itemsize
    rows = 2 * q.local_bytes(site.mesh)
    flops = 4 * heads * dim
    prefill = (
        Work(
            "attention",
            "attention_prefill",
            QK * share * flops,
            KV * token_bytes + rows,
            grain=4 * KV * kv_heads * dim,
        ),
    )
    if later:
        return prefill
    decode = Work("attention", "attention_decode", KD * flops, KD * token_bytes, grain=any_of(KD))
    return (*prefill, decode)


def _share(rows: TensorType) -> Size:
    """Of a micro-batch's rows: 1, or 1/2."""
    return normal(rows.shape[0] / T)


def merge_work(site: Site) -> tuple[Work, ...]:
    """Partial rows travel, each head with its lse, unless they are on their way already, then are read,
    weighed in and written: of the heads that a rank merges.
    """
    payload = _payload(site.op.type, site.mesh)
    merged = Work("attention", "memory", 0, 4 * payload, grain=any_of(X))
    away = site.operands[0].partial
    if away is not None and away.kind == "sent":
        return (merged,)
    return (_sent(payload, site.op), merged)


def exchange_work(site: Site) -> tuple[Work, ...]:
    return (_sent(_payload(site.op.type, site.mesh), site.op),)


def exchange_scatter_work(site: Site) -> tuple[Work, ...]:
    """To each peer its share of the heads."""
    out = site.op.type
    share = dataclasses.replace(out, axes=(out.axes[0], PRODUCT, *out.axes[2:]))
    return (_sent(_payload(share, site.mesh), site.op),)


def _payload(out: TensorType, mesh: Mesh) -> Size:
    _, heads, dim = out.local_shape(mesh)
    return X * _share(out) * heads * (dim * out.itemsize + LSE_BYTES)


def _sent(payload: Size, op: Op) -> Work:
    return Work("communication", "exchange", 0, payload, str(op.attrs["axis"]), any_of(X))


def append_work(site: Site) -> tuple[Work, ...]:
    k = site.operands[1].local_bytes(site.mesh)
    return (Work("other", "memory", 0, 2 * k + _stored_bytes(site.operands[0], site.mesh)),)


def rope_append_work(site: Site) -> tuple[Work, ...]:
    moved = site.operands[0].local_bytes(site.mesh) + site.op.type.local_bytes(site.mesh)
    return (Work("other", "memory", 0, moved + _stored_bytes(site.operands[2], site.mesh)),)


def _stored_bytes(cache: TensorType, mesh: Mesh) -> Size:
    """Keys and values of T rows, as the cache keeps them."""
    _, two, heads, dim = cache.local_shape(mesh)
    return T * (two * heads * dim * cache.itemsize)


# -------------------------------------------------------------------------------------- reference


def rotate(x_THd: Array, rot_T2h: Array) -> Array:
    """Rotary embedding in the two-halves convention of the HF checkpoints."""
    cos, sin = rot_T2h[:, None, 0], rot_T2h[:, None, 1]
    low, high = np.split(x_THd, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def merge_partials(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Online-softmax merge of (out [T, H, d], lse [T, H]); rows that no part sees give 0 and −inf."""
    lses = np.stack([lse for _, lse in parts])
    peak = lses.max(axis=0)
    weights = np.exp(lses - np.where(np.isfinite(peak), peak, 0))
    total = weights.sum(axis=0)
    out = sum(w[..., None] * o for w, (o, _) in zip(weights, parts, strict=True))
    with np.errstate(divide="ignore"):
        lse = np.where(np.isfinite(peak), peak, 0) + np.log(total)
    return out / np.where(total > 0, total, 1)[..., None], lse


def evaluate_rope_append(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    qkv, rot, _, *norms = args
    _, _, kv_heads, dim = op.results[1].type.shape
    share = op.attrs["heads"], kv_heads
    assert isinstance(dim, int) and isinstance(share[0], int) and isinstance(kv_heads, int)
    degree = (share[0] + 2 * kv_heads) * dim // qkv.shape[1]
    heads = qkv.reshape(qkv.shape[0], -1, dim)
    q, k, v = np.split(heads, [share[0] // degree, (share[0] + kv_heads) // degree], axis=1)
    if norms:
        eps = number(op.attrs, "eps")
        q, k = norm(q, norms[0], eps), norm(k, norms[1], eps)
    return rotate(q, rot), store(rank, op.results[1].type, rotate(k, rot), v)


def store(rank: Rank, cache: TensorType, keys: Array, values: Array) -> Any:
    """Append keys and values as the cache keeps them."""
    if cache.dtype == E4M3:
        keys, values = nearest(keys), nearest(values)
    return rank.append(keys, values)


def evaluate_attend(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    return rank.attend(args[0], integer(op.attrs, "half") if "half" in op.attrs else None)


def evaluate_exchange(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    """What is on its way arrives where it is merged."""
    return tuple(args)


def merge_ranks(op: Op, args: Sequence[Sequence[Array]]) -> list[tuple[Array, ...]]:
    merged = merge_partials([(out, lse) for out, lse in args])
    return [merged] * len(args)


def merge_scatter_ranks(op: Op, args: Sequence[Sequence[Array]]) -> list[tuple[Array, ...]]:
    merged = merge_partials([(out, lse) for out, lse in args])
    return list(zip(*(np.split(value, len(args), axis=1) for value in merged), strict=True))


OPS = {
    "cache": OpDef("", no_work, evaluate=lambda op, args, rank: (rank.cache(),)),
    "rope": OpDef(
        "x, rot", memory_work, infer_rope, lambda op, args, rank: (rotate(args[0], args[1]),)
    ),
    "append": OpDef(
        "kv, k, v",
        append_work,
        infer_append,
        lambda op, args, rank: (store(rank, op.type, args[1], args[2]),),
    ),
    "rope_append": OpDef(
        "qkv, rot, kv, q_norm?, k_norm?",
        rope_append_work,
        infer_rope_append,
        evaluate_rope_append,
        attrs={"heads": int, "eps": float},
    ),
    "attend": OpDef(
        "q, kv",
        attend_work,
        infer_attend,
        evaluate_attend,
        optional={"half": int},
    ),
    "exchange": OpDef(
        "out, lse", exchange_work, infer_exchange, evaluate_exchange, attrs={"axis": str}
    ),
    "exchange_scatter": OpDef(
        "out, lse", exchange_scatter_work, infer_exchange, evaluate_exchange, attrs={"axis": str}
    ),
    "merge": OpDef(
        "out, lse", merge_work, infer_merge, collective=merge_ranks, attrs={"axis": str}
    ),
    "merge_scatter": OpDef(
        "out, lse",
        merge_work,
        infer_merge_scatter,
        collective=merge_scatter_ranks,
        attrs={"axis": str},
    ),
}
