"""The dataflow graph: immutable nodes in SSA form, rebuilt by passes and never edited.

    Module    = functions, programs and the mesh
    Function  = parameters, ops, returned values; one of embed, rotation, layer…, head
    Op        = name, operands (their order lives here), attributes, results with types
    Program   = the calls of one pipeline stage, in order; unsplit modules have one, called "main"
    Call      = a function applied once, or once per layer in `layers` with its results fed back; `halved` is
                another that does the same for a micro-batch that goes in two halves

Values are named: `%q` is the string "q". Names are unique within a function or program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .types import TensorType

if TYPE_CHECKING:
    import networkx

Attr = int | float | str | tuple[str, ...] | tuple[float, ...]


@dataclass(frozen=True)
class Value:
    name: str
    type: TensorType


@dataclass(frozen=True)
class Op:
    name: str
    operands: tuple[str, ...]
    attrs: Mapping[str, Attr]
    results: tuple[Value, ...]

    @property
    def type(self) -> TensorType:
        """The type of the first result."""
        return self.results[0].type


@dataclass(frozen=True)
class Function:
    name: str
    params: tuple[Value, ...]
    ops: tuple[Op, ...]
    returns: tuple[str, ...]

    @cached_property
    def types(self) -> Mapping[str, TensorType]:
        """Type of every value that the function defines."""
        values = (*self.params, *(value for op in self.ops for value in op.results))
        return {value.name: value.type for value in values}

    @property
    def result_types(self) -> tuple[TensorType, ...]:
        return tuple(self.types[name] for name in self.returns)

    def is_spent(self, name: str, op: Op) -> bool:
        """Nobody reads the value after `op`, and it was made here: `op` may overwrite it."""
        later = self.ops[self.ops.index(op) + 1 :]
        made_here = all(value.name != name for value in self.params)
        read = any(name in other.operands for other in later) or name in self.returns
        return made_here and not read


@dataclass(frozen=True)
class Call:
    """`results = function(operands)`; with `layers`, repeated: results replace the first operands.

    halved: what is called instead for a micro-batch whose rows come in two halves (see `passes.overlap`)
    """

    function: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    layers: tuple[int, int] | None = None
    halved: str | None = None

    @property
    def count(self) -> int:
        return self.layers[1] - self.layers[0] if self.layers else 1

    @property
    def functions(self) -> tuple[str, ...]:
        """All that it may call."""
        return (self.function,) if self.halved is None else (self.function, self.halved)


@dataclass(frozen=True)
class Program:
    """One stage. Its `params` beyond the batch's inputs arrive from the stage before."""

    name: str
    params: tuple[Value, ...]
    calls: tuple[Call, ...]
    returns: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """mesh: degrees of the axes `tp` and `kvp`, both 1 before sharding."""

    name: str
    functions: Mapping[str, Function]
    programs: tuple[Program, ...]
    mesh: Mapping[str, int]

    @property
    def program(self) -> Program:
        """The only program of a module that is not split into stages."""
        (only,) = self.programs
        return only


def sources_and_copies(param: Op) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The checkpoint tensors of a `param`, and for each how many neighbouring ranks share a piece."""
    sources, copies = param.attrs["sources"], param.attrs.get("copies")
    assert isinstance(sources, tuple) and (copies is None or isinstance(copies, tuple))
    return tuple(map(str, sources)), tuple(map(int, copies or (1,) * len(sources)))


def layers_ahead(param: Op) -> int:
    """How many layers on from the one that runs is that whose weight a `param` is."""
    ahead = param.attrs.get("ahead", 0)
    assert isinstance(ahead, int)
    return ahead


def view(function: Function) -> networkx.MultiDiGraph:
    """The function as a networkx multigraph: op indices (or parameter names) as nodes, one edge per use.

    Derived, for traversals and queries; an edge carries its value's name and operand position.
    """
    import networkx

    graph = networkx.MultiDiGraph()
    producer: dict[str, int | str] = {value.name: value.name for value in function.params}
    graph.add_nodes_from(producer)
    for index, op in enumerate(function.ops):
        graph.add_node(index, op=op)
        for position, name in enumerate(op.operands):
            graph.add_edge(producer[name], index, value=name, position=position)
        producer.update((value.name, index) for value in op.results)
    for position, name in enumerate(function.returns):
        graph.add_edge(producer[name], "return", value=name, position=position)
    return graph
