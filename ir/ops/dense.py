"""Ops on rows: parameters, embedding, norms, matrix products, gated activation, reshapes.

Legend: T rows, R rows with logits, D hidden, F ffn, V vocabulary, H heads, d head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..graph import Op
from ..sizes import QK, R, T, any_of
from ..types import Partial, TensorType, degree, tensor
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
    sum_sizes,
)

Mesh = Mapping[str, int]


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def norm(x: Array, weight: Array, eps: float) -> Array:
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return np.asarray(x / scale * weight)


def halves(x: Array) -> list[Array]:
    """Which rows are in which half is the batch's to say; here the first has as many or one more."""
    return np.array_split(x, 2)


# ------------------------------------------------------------------------------------- type rules


def complete(*types: TensorType) -> None:
    for t in types:
        require(t.partial is None, f"operand {t} is partial: reduce or merge it first")


def infer_embed(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    ids, table = types
    require(ids.dtype == "i64", f"ids must be i64, not {ids}")
    require(table.axes[1] is None, f"the table may be sharded over its vocabulary only: {table}")
    partial = Partial("sum", table.axes[0]) if table.axes[0] else None
    shape = (ids.shape[0], table.shape[1])
    return (TensorType(table.dtype, shape, (None, None), partial),)


def infer_rms_norm(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    x, weight = types
    complete(x)
    require(x.axes[-1] is None, f"the normalised dim is sharded: {x}")
    require(weight.shape == x.shape[-1:], f"weight {weight} does not fit {x}")
    return (x,)


def infer_add(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    a, b = types
    complete(a, b)
    require(a == b, f"operands differ: {a} and {b}")
    return (a,)


def infer_add_rms_norm(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    x, residual, weight = types
    (total,) = infer_add((x, residual), attrs, mesh)
    return (*infer_rms_norm((total, weight), attrs, mesh), total)


def infer_linear(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    x, weight, *bias = types
    complete(x)
    require(len(x.shape) == len(weight.shape) == 2, f"x and w must have two dims: {x}, {weight}")
    require(x.shape[1] == weight.shape[1], f"inner sizes differ: {x} and {weight}")
    require(x.axes[1] == weight.axes[1], f"inner dims are sharded differently: {x} and {weight}")
    out, inner = weight.axes
    require(not (out and inner), f"the weight is sharded twice: {weight}")
    if bias:
        require(inner is None, "a bias would be added once per rank of a partial sum")
        require(bias[0].axes == (out,), f"bias {bias[0]} is not sharded like {weight}")
    partial = Partial("sum", inner) if inner else None
    return (TensorType(x.dtype, (x.shape[0], weight.shape[0]), (x.axes[0], out), partial),)


def infer_silu_mul(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    return infer_add(types, attrs, mesh)


def infer_swiglu(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    (x,) = types
    complete(x)
    rows, width = x.shape
    require(isinstance(width, int) and width % 2 == 0, f"gate and up need an even width: {x}")
    assert isinstance(width, int)
    return (dataclasses.replace(x, shape=(rows, width // 2)),)


def infer_halve(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    (x,) = types
    complete(x)
    require(x.shape[0] == T, f"not all rows of a micro-batch: {x}")
    half = dataclasses.replace(x, shape=(T / 2, *x.shape[1:]))
    return half, half


def infer_join(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    a, b = types
    complete(a, b)
    require(a == b and a.shape[0] == T / 2, f"not two halves: {a} and {b}")
    return (dataclasses.replace(a, shape=(T, *a.shape[1:])),)


def infer_split_heads(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    (x,) = types
    complete(x)
    rows, width = x.shape
    heads = integer(attrs, "heads")
    assert isinstance(width, int)
    require(width % heads == 0, f"{heads} heads do not divide {x}")
    ranks = degree(x.axes[1], mesh) if x.axes[1] else 1
    require(heads % ranks == 0, f"{ranks} ranks do not divide {heads} heads")
    return (TensorType(x.dtype, (rows, heads, width // heads), (x.axes[0], x.axes[1], None)),)


def infer_merge_heads(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    (x,) = types
    complete(x)
    rows, heads, dim = x.shape
    assert isinstance(heads, int) and isinstance(dim, int)
    return (TensorType(x.dtype, (rows, heads * dim), x.axes[:2]),)


def infer_select(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    x, rows = types
    complete(x)
    return (TensorType(x.dtype, (rows.shape[0], *x.shape[1:]), x.axes),)


def infer_cast(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    return (dataclasses.replace(types[0], dtype=str(attrs["dtype"])),)


def infer_rotary(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    (pos,) = types
    require(pos.dtype == "i64", f"positions must be i64, not {pos}")
    frequencies = attrs["inv_freq"]
    assert isinstance(frequencies, tuple)
    return (tensor("f32", pos.shape[0], 2, len(frequencies)),)


# ------------------------------------------------------------------------------------------- work


def linear_work(site: Site) -> tuple[Work, ...]:
    return product_work(site, "matmul")


def product_work(site: Site, resource: str) -> tuple[Work, ...]:
    """Its grain is a row, where there is prefill: the few rows of decodes alone, or of a head, stream the
    weights in a kernel of their own, and pay for bytes.
    """
    rows, inner = site.operands[0].local_shape(site.mesh)
    columns = site.op.type.local_shape(site.mesh)[1]
    row = 2 * inner * columns
    grain = 0 if rows == R else row * any_of(QK)
    return (Work("linear", resource, rows * row, site.moved_bytes(), grain=grain),)


def gather_work(site: Site) -> tuple[Work, ...]:
    """Embedding and row selection: rows are read and written, the table is not swept."""
    return (Work("other", "memory", 0, 2 * site.op.type.local_bytes(site.mesh)),)


def add_rms_norm_work(site: Site) -> tuple[Work, ...]:
    rows = (*site.operands[:2], *(value.type for value in site.op.results))
    return (Work("other", "memory", 0, sum_sizes(t.local_bytes(site.mesh) for t in rows)),)


# -------------------------------------------------------------------------------------- reference


def evaluate_param(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    return (rank.parameter(op),)


def evaluate_embed(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    ids, table = args
    first = rank.tp_rank * table.shape[0] if op.type.partial else 0
    inside = (ids >= first) & (ids < first + table.shape[0])
    return (np.where(inside[:, None], table[np.where(inside, ids - first, 0)], 0),)


def evaluate_rms_norm(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    return (norm(args[0], args[1], number(op.attrs, "eps")),)


def evaluate_add_rms_norm(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    x, residual, weight = args
    total = x + residual
    return norm(total, weight, number(op.attrs, "eps")), total


def evaluate_linear(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    x, weight, *bias = args
    y = x @ weight.T
    return (y + bias[0] if bias else y,)


def evaluate_swiglu(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    gate, up = np.split(args[0], 2, axis=1)
    return (silu(gate) * up,)


def evaluate_split_heads(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    dim = op.type.shape[2]
    assert isinstance(dim, int)
    return (args[0].reshape(args[0].shape[0], -1, dim),)


def evaluate_rotary(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    """cos and sin of position × inverse frequency; the angle is rounded to f32 as in HF models."""
    frequencies = np.asarray(op.attrs["inv_freq"], dtype=np.float32)
    angle = args[0].astype(np.float32)[:, None] * frequencies
    table = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return ((table * np.float32(number(op.attrs, "factor"))).astype(rank.dtype),)


OPS = {
    "param": OpDef(
        "",
        no_work,
        evaluate=evaluate_param,
        attrs={"sources": tuple},
        optional={"ahead": int, "copies": tuple},
    ),
    "embed": OpDef("ids, table", gather_work, infer_embed, evaluate_embed),
    "rotary": OpDef(
        "pos",
        memory_work,
        infer_rotary,
        evaluate_rotary,
        attrs={"inv_freq": tuple, "factor": float},
    ),
    "rms_norm": OpDef("x, w", memory_work, infer_rms_norm, evaluate_rms_norm, attrs={"eps": float}),
    "add_rms_norm": OpDef(
        "x, residual, w",
        add_rms_norm_work,
        infer_add_rms_norm,
        evaluate_add_rms_norm,
        attrs={"eps": float},
    ),
    "linear": OpDef("x, w, b?", linear_work, infer_linear, evaluate_linear),
    "add": OpDef("a, b", memory_work, infer_add, lambda op, args, rank: (args[0] + args[1],)),
    "halve": OpDef("x", no_work, infer_halve, lambda op, args, rank: tuple(halves(args[0]))),
    "join": OpDef(
        "first, second", memory_work, infer_join, lambda op, args, rank: (np.concatenate(args),)
    ),
    "silu_mul": OpDef(
        "gate, up", memory_work, infer_silu_mul, lambda op, args, rank: (silu(args[0]) * args[1],)
    ),
    "swiglu": OpDef("gate_up", memory_work, infer_swiglu, evaluate_swiglu),
    "split_heads": OpDef(
        "x", no_work, infer_split_heads, evaluate_split_heads, attrs={"heads": int}
    ),
    "merge_heads": OpDef(
        "x",
        no_work,
        infer_merge_heads,
        lambda op, args, rank: (args[0].reshape(args[0].shape[0], -1),),
    ),
    "select": OpDef(
        "x, rows", gather_work, infer_select, lambda op, args, rank: (args[0][args[1]],)
    ),
    "cast": OpDef(
        "x", memory_work, infer_cast, lambda op, args, rank: (args[0],), attrs={"dtype": str}
    ),
}
