"""Sums over tp together with what reads them, where that is an add, with a norm behind it or without.

`all_reduce_NAME` is `all_reduce` of one operand and then NAME: one op, so that one kernel may read the rows
of all ranks where they lie and add them up on the way. `turn` says into which of two buffers the partial
sums are written (see `passes.one_shot`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..graph import Op
from . import dense, fp8
from .base import Array, Attrs, OpDef, Site, Types, Work
from .collective import infer_all_reduce

SUMMED = {"add": 1, "add_rms_norm": 0, "add_rms_norm_fp8": 0}
"""Ops that may take a sum over ranks themselves → which of their operands it is."""


def after_all_reduce(plain: OpDef, at: int) -> OpDef:
    """The op, whose operand `at` is a partial sum that it completes."""

    def infer(types: Types, attrs: Attrs, mesh: Mapping[str, int]) -> Types:
        assert plain.infer is not None
        whole = infer_all_reduce((types[at],), attrs, mesh)
        return plain.infer((*types[:at], *whole, *types[at + 1 :]), attrs, mesh)

    def work(site: Site) -> tuple[Work, ...]:
        payload, axis = site.operands[at].local_bytes(site.mesh), str(site.op.attrs["axis"])
        return (Work("communication", "one_shot", 0, payload, axis), *plain.works(site))

    def collect(op: Op, args: Sequence[Sequence[Array]]) -> list[tuple[Array, ...]]:
        total = np.sum([operands[at] for operands in args], axis=0)
        return [(*operands[:at], total, *operands[at + 1 :]) for operands in args]

    return dataclasses.replace(
        plain,
        works=work,
        infer=infer,
        collective=collect,
        attrs={"axis": str, "turn": int, **plain.attrs},
    )


OPS = {
    f"all_reduce_{name}": after_all_reduce({**dense.OPS, **fp8.OPS}[name], at)
    for name, at in SUMMED.items()
}
