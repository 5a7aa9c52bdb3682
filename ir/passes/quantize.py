"""Quantize: the products of a fused layer become products of 8-bit floats. Valid IR in, valid IR out.

    linear(x, w)                  → linear_fp8(x, x_scale, w, w_scale)
    x of a norm or of swiglu      → the same op stores it quantised
    any other x (of attention)    → quantize_fp8(x)

A weight keeps its placement; its scales, one per output channel, come from NAME.weight_scale, as
llm-compressor writes them. Embedding, norms and head stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..graph import Function, Module, Op, Value, sources_and_copies
from ..ops import make
from ..ops.fp8 import ROWWISE
from ..types import E4M3, TensorType


def quantize(module: Module) -> Module:
    """The module with its layers' products in e4m3."""
    layer = _Quantizer(module).run(module.functions["layer"])
    return dataclasses.replace(module, functions={**module.functions, layer.name: layer})


class _Quantizer:
    """Rewrites one function; `pairs` maps each quantised value to itself in e4m3 and its scales."""

    def __init__(self, module: Module) -> None:
        self.mesh = module.mesh
        self.pairs: dict[str, tuple[Value, Value]] = {}

    def run(self, function: Function) -> Function:
        products = [op for op in function.ops if op.name == "linear"]
        self.weights = {op.operands[1] for op in products}
        others = (op for op in function.ops if op.name != "linear")
        self.whole = {name for op in others for name in op.operands} | {*function.returns}
        self.rows = {op.operands[0] for op in products}
        self.types = function.types
        ops = tuple(new for op in function.ops for new in self._rewrite(op))
        return dataclasses.replace(function, ops=ops)

    def _rewrite(self, op: Op) -> Iterator[Op]:
        first = op.results[0].name
        if op.name == "param" and first in self.weights:
            yield from self._weight(op)
        elif op.name in ROWWISE and first in self.rows - self.whole:
            yield self._storing(op)
        elif op.name == "linear":
            yield from self._product(op)
        else:
            yield op

    def _weight(self, op: Op) -> Iterator[Op]:
        name, plain = op.results[0].name, op.type
        weight = Value(name, dataclasses.replace(plain, dtype=E4M3))
        channels = TensorType("f32", (plain.shape[0], 1), (plain.axes[0], None))
        scale = Value(f"{name}_scale", channels)
        self.pairs[name] = (weight, scale)
        sources, _ = sources_and_copies(op)
        yield dataclasses.replace(op, results=(weight,))
        scales = tuple(f"{source}_scale" for source in sources)
        yield dataclasses.replace(op, attrs={**op.attrs, "sources": scales}, results=(scale,))

    def _storing(self, op: Op) -> Op:
        name, *others = (value.name for value in op.results)
        operands = self._values(op.operands)
        names = (name, f"{name}_scale", *others)
        made = make(f"{op.name}_fp8", operands, names, op.attrs, self.mesh)
        self.pairs[name] = (made.results[0], made.results[1])
        return made

    def _product(self, op: Op) -> Iterator[Op]:
        x, weight, *bias = op.operands
        if x not in self.pairs:
            names = (f"{x}_fp8", f"{x}_scale")
            made = make("quantize_fp8", self._values((x,)), names, {}, self.mesh)
            self.pairs[x] = (made.results[0], made.results[1])
            yield made
        operands = [*self.pairs[x], *self.pairs[weight], *self._values(bias)]
        result = op.results[0].name
        yield make("linear_fp8", operands, (result,), {"dtype": op.type.dtype}, self.mesh)

    def _values(self, names: tuple[str, ...] | list[str]) -> list[Value]:
        return [Value(name, self.types[name]) for name in names]
