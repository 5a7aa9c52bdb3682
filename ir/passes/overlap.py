"""Overlap: beside each layer that merges over kvp, one that does the same in two halves of the rows, so that
partial results travel while others are computed. Valid IR in, valid IR out.

    out, lse = attend q          →   q_first, q_second = halve q         and all else that the rest reads
    merged = merge out, lse          attend first;   exchange first
    … the rest of the layer …        attend second;  exchange second     while first's results travel
                                     merge first;    … the rest of it …  while second's do
                                     merge second;   … the rest of it …
                                     join

What comes before attention stays whole: all keys are stored before any query asks. It is rows that are
cut, not heads: there are rows wherever there is much to send, but often a single KV head on a rank, and
what follows attention needs all heads of a row. The price is that keys and weights are read twice, which
is nothing to large chunks, whose time is arithmetic, and too much for decodes. So a call of the layer
names both functions, and the runtime says of each micro-batch which it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..graph import Call, Function, Module, Op, Program, Value
from ..ops import make

HALVES = ("first", "second")
_EXCHANGES = {"merge": "exchange", "merge_scatter": "exchange_scatter"}


def overlap(module: Module) -> Module:
    """The module with a function of halves beside each that merges."""
    halved = {
        name: _Halver(function, module).run(f"{name}_halves")
        for name, function in module.functions.items()
        if any(op.name in _EXCHANGES for op in function.ops)
    }
    functions = {
        f.name: f
        for name, function in module.functions.items()
        for f in (function, *([halved[name]] if name in halved else []))
    }

    def named(call: Call) -> Call:
        if call.function not in halved:
            return call
        return dataclasses.replace(call, halved=halved[call.function].name)

    programs = tuple(
        Program(p.name, p.params, tuple(map(named, p.calls)), p.returns) for p in module.programs
    )
    return dataclasses.replace(module, functions=functions, programs=programs)


class _Halver:
    """Rewrites one function; `halves[i]` maps each value that depends on attention to its half i."""

    def __init__(self, function: Function, module: Module) -> None:
        self.function, self.mesh = function, module.mesh
        names = [op.name for op in function.ops]
        at = names.index("attend")
        self.whole, self.attend, self.rest = (
            function.ops[:at],
            function.ops[at],
            function.ops[at + 1 :],
        )
        self.halves: tuple[dict[str, Value], dict[str, Value]] = ({}, {})

    def run(self, name: str) -> Function:
        params = [op for op in self.rest if op.name == "param"]
        rest = [op for op in self.rest if op.name != "param"]
        ops = [*self.whole, *params, *self._cut(rest)]
        for half in (0, 1):
            ops += self._attend(half, rest)
        for half in (0, 1):
            ops += [self._halved(op, half) for op in rest]
        ops += [self._join(value) for value in self.function.returns]
        return Function(name, self.function.params, tuple(ops), self.function.returns)

    def _cut(self, rest: list[Op]) -> Iterator[Op]:
        """The rows that attention and the rest read of what was computed whole."""
        made = {value.name for op in (self.attend, *rest) for value in op.results}
        read = [self.attend.operands[0], *(name for op in rest for name in op.operands)]
        weights = {op.results[0].name for op in self.function.ops if op.name == "param"}
        for name in dict.fromkeys(read):
            if name not in made and name not in weights:
                whole = Value(name, self.function.types[name])
                op = make("halve", [whole], [f"{name}_{half}" for half in HALVES], {}, self.mesh)
                yield op
                for known, value in zip(self.halves, op.results, strict=True):
                    known[name] = value

    def _attend(self, half: int, rest: list[Op]) -> Iterator[Op]:
        """Attention of one half, and its results on their way."""
        q, kv = self.attend.operands
        given = [self.halves[half][q], Value(kv, self.function.types[kv])]
        attrs = {**self.attend.attrs, "half": half}
        names = [f"{value.name}_{HALVES[half]}" for value in self.attend.results]
        attend = make("attend", given, names, attrs, self.mesh)
        yield attend
        merge = next(op for op in rest if op.name in _EXCHANGES)
        sent = [f"{name}_sent" for name in names]
        exchange = make(_EXCHANGES[merge.name], attend.results, sent, merge.attrs, self.mesh)
        yield exchange
        for old, new in zip(self.attend.results, exchange.results, strict=True):
            self.halves[half][old.name] = new

    def _halved(self, op: Op, half: int) -> Op:
        known, types = self.halves[half], self.function.types
        operands = [known.get(name, Value(name, types[name])) for name in op.operands]
        names = [f"{value.name}_{HALVES[half]}" for value in op.results]
        made = make(op.name, operands, names, op.attrs, self.mesh)
        known.update(zip((value.name for value in op.results), made.results, strict=True))
        return made

    def _join(self, name: str) -> Op:
        return make("join", [known[name] for known in self.halves], [name], {}, self.mesh)
