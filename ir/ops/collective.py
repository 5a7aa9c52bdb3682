"""Collectives over an axis of the mesh, or the product of both, inserted by the shard pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..graph import Op
from .base import Array, Attrs, OpDef, Site, Types, Work, integer, require


def infer_all_reduce(types: Types, attrs: Attrs, mesh: Mapping[str, int]) -> Types:
    (x,) = types
    require(
        x.partial is not None and x.partial.kind == "sum" and x.partial.axis == attrs["axis"],
        f"{x} is not a partial sum over {attrs['axis']}",
    )
    return (dataclasses.replace(x, partial=None),)


def infer_all_gather(types: Types, attrs: Attrs, mesh: Mapping[str, int]) -> Types:
    (x,) = types
    dim = integer(attrs, "dim")
    require(x.axes[dim] == attrs["axis"], f"dim {dim} of {x} is not sharded over {attrs['axis']}")
    axes = tuple(None if i == dim else axis for i, axis in enumerate(x.axes))
    return (dataclasses.replace(x, axes=axes),)


def collective_work(site: Site) -> tuple[Work, ...]:
    payload = site.op.type.local_bytes(site.mesh)
    return (Work("communication", site.op.name, 0, payload, str(site.op.attrs["axis"])),)


def sum_ranks(op: Op, args: Sequence[Sequence[Array]]) -> list[tuple[Array, ...]]:
    return [(np.sum([x for (x,) in args], axis=0),)] * len(args)


def gather_ranks(op: Op, args: Sequence[Sequence[Array]]) -> list[tuple[Array, ...]]:
    whole = np.concatenate([x for (x,) in args], axis=integer(op.attrs, "dim"))
    return [(whole,)] * len(args)


OPS = {
    "all_reduce": OpDef(
        "x", collective_work, infer_all_reduce, collective=sum_ranks, attrs={"axis": str}
    ),
    "all_gather": OpDef(
        "x",
        collective_work,
        infer_all_gather,
        collective=gather_ranks,
        attrs={"axis": str, "dim": int},
    ),
}
