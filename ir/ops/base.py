"""What an op is: operands, result types, work and reference evaluation, in one place.

Each op is one `OpDef` in one of the modules beside this one; everything else looks ops up in
`mnemoc.ir.ops.OPS`. `infer` is what the verifier checks a stored type against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..graph import Attr, Op
from ..sizes import Size
from ..types import TensorType

Array = NDArray[Any]
Types = tuple[TensorType, ...]
Attrs = Mapping[str, Attr]


class TypeRule(Exception):
    """An operand breaks the op's type rule; the verifier adds the place and raises VerifyError."""


@dataclass(frozen=True)
class Work:
    """What one rank does for an op once: exact counts, from local shapes.

    part:     "linear", "attention", "communication" or "other": how a prediction is broken down
    resource: whose speed limits it: "matmul", "matmul_fp8", "attention_prefill", "attention_decode",
              "memory", or a collective: "all_reduce", "one_shot" (an all_reduce of whichever kind is
              quicker), "all_gather", "exchange"
    flops:    multiply and add counted apart; 0 where only bytes matter
    bytes:    device memory traffic; for collectives the payload that one rank ends up with
    axis:     the axis that a collective crosses
    grain:    the flops (bytes where only they matter, messages of a collective) that one step of the
              kernel's own size brings. Its speed grows with that size, x = flops / grain: rows of a
              matrix product, bytes of a stream; a call costs as much as so and so many grains more
              (see `planner.curves`). `any_of` a symbol where it costs nothing if there is none.
    """

    part: str
    resource: str
    flops: Size
    bytes: Size
    axis: str | None = None
    grain: Size = 1


@dataclass(frozen=True)
class Site:
    """An op with the types of its operands and the mesh: what `works` is computed from."""

    op: Op
    operands: Types
    mesh: Mapping[str, int]

    def moved_bytes(self) -> Size:
        """Every operand read once and every result written once."""
        types = (*self.operands, *(value.type for value in self.op.results))
        return sum_sizes(t.local_bytes(self.mesh) for t in types)


class Rank(Protocol):
    """What an op may ask of the simulated rank that evaluates it (see `interpret`)."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def tp_rank(self) -> int: ...
    def parameter(self, op: Op) -> Array: ...
    def cache(self) -> Any: ...
    def append(self, keys: Array, values: Array) -> Any: ...
    def attend(self, queries: Array, half: int | None) -> tuple[Array, Array]: ...


@dataclass(frozen=True)
class OpDef:
    """The rules of one op.

    signature: operands in words, optional ones with "?": "x, w, b?"
    attrs:     attribute names and their types; `optional`: those that may be absent
    infer:     operand types → result types; None for ops whose type is declared (param, cache)
    works:     exact work per rank
    evaluate:  reference on one rank's pieces; None for what is a collective and no more
    collective: reference over the ranks along the op's axis: one operand list per rank → one result
               list per rank, or, where `evaluate` goes on from them, one operand list; None for local ops
    """

    signature: str
    works: Callable[[Site], tuple[Work, ...]]
    infer: Callable[[Types, Attrs, Mapping[str, int]], Types] | None = None
    evaluate: Callable[[Op, Sequence[Array], Rank], tuple[Array, ...]] | None = None
    collective: Callable[[Op, Sequence[Sequence[Array]]], list[tuple[Array, ...]]] | None = None
    attrs: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)

    @property
    def arity(self) -> tuple[int, int]:
        names = [name.strip() for name in self.signature.split(",") if name.strip()]
        return sum(not name.endswith("?") for name in names), len(names)


def no_work(site: Site) -> tuple[Work, ...]:
    """A view or a name: nothing is computed or moved."""
    return ()


def memory_work(site: Site) -> tuple[Work, ...]:
    """An element-wise op: bounded by the bytes that it reads and writes."""
    return (Work("other", "memory", 0, site.moved_bytes()),)


def sum_sizes(sizes: Any) -> Size:
    total: Size = 0
    for size in sizes:
        total = total + size
    return total


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise TypeRule(rule)


def number(attrs: Attrs, name: str) -> float:
    value = attrs[name]
    assert isinstance(value, int | float)
    return value


def integer(attrs: Attrs, name: str) -> int:
    value = attrs[name]
    assert isinstance(value, int)
    return value
