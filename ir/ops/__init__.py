"""The ops of the IR. One op, one place; everything else looks it up here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..graph import Attr, Function, Module, Op, Value
from ..types import TensorType
from . import attention, collective, dense, fp8, one_shot
from .base import OpDef, Site, TypeRule, Work

OPS: Mapping[str, OpDef] = {
    **dense.OPS,
    **attention.OPS,
    **collective.OPS,
    **fp8.OPS,
    **one_shot.OPS,
}

__all__ = ["OPS", "OpDef", "TypeRule", "Work", "function_works", "infer", "make", "works"]


def infer(
    name: str, operands: tuple[TensorType, ...], attrs: Mapping[str, Attr], mesh: Mapping[str, int]
) -> tuple[TensorType, ...]:
    """Result types of an op, or TypeRule."""
    rule = OPS[name].infer
    assert rule is not None, f"the type of {name} is declared, not inferred"
    return rule(operands, attrs, mesh)


def make(
    name: str,
    operands: Sequence[Value],
    results: Sequence[str],
    attrs: Mapping[str, Attr],
    mesh: Mapping[str, int],
) -> Op:
    """An op with inferred result types."""
    types = infer(name, tuple(value.type for value in operands), attrs, mesh)
    values = tuple(Value(n, t) for n, t in zip(results, types, strict=True))
    return Op(name, tuple(value.name for value in operands), dict(attrs), values)


def works(op: Op, function: Function, mesh: Mapping[str, int]) -> tuple[Work, ...]:
    """Exact work per rank of one op of `function`."""
    operands = tuple(function.types[name] for name in op.operands)
    return OPS[op.name].works(Site(op, operands, mesh))


def function_works(function: Function, module: Module) -> tuple[Work, ...]:
    """Exact work per rank of one call of `function`, op by op."""
    return tuple(work for op in function.ops for work in works(op, function, module.mesh))
