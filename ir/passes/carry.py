"""Carry: each layer ends with the norm that the next begins with, so that one kernel adds and norms where two
layers meet. Valid IR in, valid IR out.

    x1 = layer[0:n](x0, rot)     →   normed0   = layer_entry[0:1](x0)                  the first layer's norm
                                     x, normed = layer[0:n-1](x0, normed0, rot)        … add_rms_norm
                                     x1        = layer_last[n-1:n](x, normed, rot)     … add

Only x leaves a run of layers, so stages send what they sent before. The weight of the norm is still the next
layer's: a param that is `ahead` by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..graph import Call, Function, Module, Op, Value
from ..ops import make

_NORMS = ("rms_norm", "rms_norm_fp8")
ENTRY, LAST = "entry", "last"


def carry(module: Module) -> Module:
    """The module with the norms that its layers begin with carried there by the layers before."""
    runs = [call for p in module.programs for call in p.calls if call.layers]
    entered = {call.function for call in runs}
    carriers = {
        name: carrier
        for name in dict.fromkeys(name for call in runs for name in call.functions)
        if (carrier := _Carrier.of(module.functions[name], module)) is not None
    }
    functions: dict[str, Function] = {}
    for name, function in module.functions.items():
        if carrier := carriers.get(name):
            made = (*((carrier.entry,) if name in entered else ()), carrier.layer, carrier.last)
        else:
            made = (function,)
        functions |= {f.name: f for f in made}
    programs = tuple(
        dataclasses.replace(p, calls=tuple(new for c in p.calls for new in _calls(c, carriers)))
        for p in module.programs
    )
    return dataclasses.replace(module, functions=functions, programs=programs)


def _calls(call: Call, carriers: dict[str, _Carrier]) -> Iterator[Call]:
    """What stands in place of a call."""
    carrier = carriers.get(call.function)
    if carrier is None or call.layers is None:
        yield call
        return
    (first, end), (x, *rest), (y,) = call.layers, call.operands, call.results
    entered = tuple(f"{x}_{name}" for name in carrier.carried)
    yield Call(f"{call.function}_{ENTRY}", (x,), entered, (first, first + 1))
    if end - first > 1:
        x, before = f"{y}_before", entered
        entered = tuple(f"{x}_{name}" for name in carrier.carried)
        operands, results = (call.operands[0], *before, *rest), (x, *entered)
        layers = (first, end - 1)
        yield dataclasses.replace(call, operands=operands, results=results, layers=layers)
    yield Call(
        f"{call.function}_{LAST}",
        (x, *entered, *rest),
        (y,),
        (end - 1, end),
        call.halved and f"{call.halved}_{LAST}",
    )


@dataclasses.dataclass(frozen=True)
class _Carrier:
    """A layer, its first norm and the weight of that."""

    function: Function
    norm: Op
    weight: Op
    module: Module

    @classmethod
    def of(cls, function: Function, module: Module) -> _Carrier | None:
        """None where a layer does not begin with a norm of its rows, or returns more than rows."""
        params = {op.results[0].name: op for op in function.ops if op.name == "param"}
        norm = next((op for op in function.ops if op.name not in ("param", "cache")), None)
        if norm is None or norm.name not in _NORMS or len(function.returns) != 1:
            return None
        x, weight = norm.operands
        if x != function.params[0].name or weight not in params:
            return None
        return cls(function, norm, params[weight], module)

    @property
    def carried(self) -> tuple[str, ...]:
        """What the norm makes."""
        return tuple(value.name for value in self.norm.results)

    @property
    def entry(self) -> Function:
        """The norm alone."""
        x = self.function.params[0]
        name = f"{self.function.name}_{ENTRY}"
        return Function(name, (x,), (self.weight, self.norm), self.carried)

    @property
    def last(self) -> Function:
        """The layer without it."""
        x, *rest = self.function.params
        ops = tuple(op for op in self.function.ops if op not in (self.norm, self.weight))
        name, params = f"{self.function.name}_{LAST}", (x, *self.norm.results, *rest)
        return Function(name, params, ops, self.function.returns)

    @property
    def layer(self) -> Function:
        """The same with the norm of the next at its end: in one with the sum that it is of, if it is."""
        last, attrs, mesh = self.last, self.norm.attrs, self.module.mesh
        weight = dataclasses.replace(self.weight, attrs={**self.weight.attrs, "ahead": 1})
        names, given = tuple(f"next_{name}" for name in self.carried), weight.results[0]
        (y,), (*before, end) = last.returns, last.ops
        if end.name == "add" and end.results[0].name == y:
            residual, delta = (Value(name, last.types[name]) for name in end.operands)
            operands = [delta, residual, given]
            norm = make(f"add_{self.norm.name}", operands, (*names, y), attrs, mesh)
            ops = (*before, weight, norm)
        else:
            rows = Value(y, last.types[y])
            ops = (*last.ops, weight, make(self.norm.name, [rows, given], names, attrs, mesh))
        return Function(self.function.name, last.params, ops, (y, *names))
