"""A small writer of functions: ops get their types inferred as they are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .graph import Attr, Function, Op, Value
from .ops import make
from .types import TensorType


class FunctionBuilder:
    """Collects the ops of one function; values are passed around as `Value`."""

    def __init__(self, name: str, params: Sequence[Value], mesh: Mapping[str, int]) -> None:
        self.name, self.params, self.mesh = name, tuple(params), mesh
        self.ops: list[Op] = []
        self._taken = {value.name for value in params}

    def declare(self, name: str, result: str, type: TensorType, **attrs: Attr) -> Value:
        """An op whose type is declared: `param` or `cache`."""
        value = Value(self._fresh(result), type)
        self.ops.append(Op(name, (), attrs, (value,)))
        return value

    def add(self, name: str, result: str, *operands: Value, **attrs: Attr) -> Value:
        """An op with one result."""
        (value,) = self.add_many(name, (result,), *operands, **attrs)
        return value

    def add_many(
        self, name: str, results: Sequence[str], *operands: Value, **attrs: Attr
    ) -> tuple[Value, ...]:
        op = make(name, operands, [self._fresh(result) for result in results], attrs, self.mesh)
        self.ops.append(op)
        return op.results

    def finish(self, *returns: Value) -> Function:
        return Function(self.name, self.params, tuple(self.ops), tuple(v.name for v in returns))

    def _fresh(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name
