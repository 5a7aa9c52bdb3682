"""Products of 8-bit floats (W8A8), and the ops that make rows for them.

A row is scaled by its own largest value; where its columns are sharded, each rank's piece has a scale of
its own, so that no rank waits for another. Weights have a scale per output channel. vLLM knows the scheme as
W8A8 with channel-wise weights and dynamic per-token activations. `rms_norm_fp8`, `add_rms_norm_fp8` and
`swiglu_fp8` see a whole row at once and store it quantised; what no such op makes takes a pass of its own,
`quantize_fp8`.

Legend: T rows, W columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..graph import Op
from ..types import E4M3, TensorType, degree
from . import dense
from .base import Array, Attrs, OpDef, Rank, Site, Types, Work, memory_work, require
from .e4m3 import scaled

Mesh = Mapping[str, int]


# ------------------------------------------------------------------------------------- type rules


def rows_and_scales(x: TensorType, mesh: Mesh) -> Types:
    """[T, W] as e4m3, and f32 [T, 1]: a column per rank where W is sharded."""
    axis = x.axes[1]
    pieces = degree(axis, mesh) if axis else 1
    scales = TensorType("f32", (x.shape[0], pieces), (x.axes[0], axis))
    return dataclasses.replace(x, dtype=E4M3), scales


def infer_quantize(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    (x,) = types
    dense.complete(x)
    return rows_and_scales(x, mesh)


def infer_linear(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
    x, x_scale, weight, weight_scale, *bias = types
    require(x.dtype == weight.dtype == E4M3, f"x and w must be {E4M3}: {x}, {weight}")
    require(x_scale == rows_and_scales(x, mesh)[1], f"{x_scale} are not the scales of {x}")
    channels = TensorType("f32", (weight.shape[0], 1), (weight.axes[0], None))
    require(weight_scale == channels, f"{weight_scale} are not the scales of {weight}")
    (y,) = dense.infer_linear((x, weight, *bias), attrs, mesh)
    return (dataclasses.replace(y, dtype=str(attrs["dtype"])),)


# ------------------------------------------------------------------------------------------- work


def linear_work(site: Site) -> tuple[Work, ...]:
    rows, _, weight, *_ = site.operands
    plain = Site(site.op, (rows, weight), site.mesh)
    (work,) = dense.product_work(plain, "matmul_fp8")
    return (dataclasses.replace(work, bytes=site.moved_bytes()),)


# -------------------------------------------------------------------------------------- reference


def evaluate_linear(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
    x, x_scale, weight, weight_scale, *bias = args
    return dense.evaluate_linear(op, (x * x_scale, weight * weight_scale, *bias), rank)


def storing_fp8(plain: OpDef) -> OpDef:
    """The op, with its first result stored quantised: as e4m3 and its scales."""

    def infer(types: Types, attrs: Attrs, mesh: Mesh) -> Types:
        assert plain.infer is not None
        first, *rest = plain.infer(types, attrs, mesh)
        return (*rows_and_scales(first, mesh), *rest)

    def evaluate(op: Op, args: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
        assert plain.evaluate is not None
        first, *rest = plain.evaluate(op, args, rank)
        return (*scaled(first), *rest)

    return dataclasses.replace(plain, infer=infer, evaluate=evaluate)


ROWWISE = ("rms_norm", "add_rms_norm", "swiglu")
"""Ops whose kernels hold a whole row."""

OPS = {
    **{f"{name}_fp8": storing_fp8(dense.OPS[name]) for name in ROWWISE},
    "quantize_fp8": OpDef("x", memory_work, infer_quantize, lambda op, args, rank: scaled(args[0])),
    "linear_fp8": OpDef(
        "x, x_scale, w, w_scale, b?",
        linear_work,
        infer_linear,
        evaluate_linear,
        attrs={"dtype": str},
    ),
}
