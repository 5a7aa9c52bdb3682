"""Shard: valid unsharded IR in, the same computation over a tp × kvp mesh out.

Each weight's placement follows from how it is used, collectives are added where an op needs a whole
value, and every type is inferred anew:

    linear of a whole x         its weight is cut by columns where tp divides them (heads for q, k, v);
                                where tp is a multiple of the KV heads, each is repeated on as many
                                neighbouring ranks, so that every rank has one: copies
    linear of a sharded x       its weight is cut by rows; the partial sums are reduced at once
    embed                       its table is cut by vocabulary where tp divides it
    cache                       sharded along the sequence over kvp and by KV heads over tp
    attend of a sharded cache   its (out, lse) are merged over kvp
    returned values             whole again

KVP groups repeat what is not attention. With ffn="helix" (after NVIDIA's Helix, arXiv 2507.07120) the output
projection and the FFN are cut over all tp × kvp ranks instead, for which every group needs every row:

    attend of a sharded cache   each group merges its share of the heads: merge_scatter
    linear that silu_mul gates  its weight is cut by columns over tp_kvp
    linear of a sharded x       by rows over the same ranks, as ever
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ...errors import BadInput
from ..graph import Function, Module, Op, Value
from ..ops import make
from ..sizes import Size
from ..types import PRODUCT, TensorType, degree


def shard(module: Module, *, tp: int, kvp: int, ffn: str = "repeated") -> Module:
    """The module over a mesh of tp × kvp ranks; ffn: "repeated" in each KVP group, or "helix".

    BadInput if the degrees do not divide what must be cut.
    """
    mesh, helix = {"tp": tp, "kvp": kvp}, ffn == "helix" and kvp > 1
    functions = {f.name: _Sharder(f, mesh, helix).run() for f in module.functions.values()}
    return dataclasses.replace(module, functions=functions, mesh=mesh)


class _Sharder:
    """Rewrites one function; `values` maps each old name to its (possibly renamed) sharded value."""

    def __init__(self, function: Function, mesh: Mapping[str, int], helix: bool) -> None:
        self.function, self.mesh, self.helix = function, mesh, helix
        gated = (op for op in function.ops if op.name == "silu_mul")
        self.gates = {name for op in gated for name in op.operands}
        self.ops: list[Op] = []
        self.values = {value.name: value for value in function.params}
        self.weights = {op.results[0].name: op for op in function.ops if op.name == "param"}
        self.heads = _head_counts(function)
        self.copies = self._kv_copies()

    def run(self) -> Function:
        for op in self.function.ops:
            if op.name != "param":
                self._rewrite(op)
        returns = tuple(self._whole(self.values[name]).name for name in self.function.returns)
        return dataclasses.replace(self.function, ops=tuple(self.ops), returns=returns)

    def _rewrite(self, op: Op) -> None:
        if op.name == "cache":
            self._keep(dataclasses.replace(op, results=(self._cache(op.results[0]),)))
            return
        self._place_weights(op)
        operands = [self.values[name] for name in op.operands]
        names = [value.name for value in op.results]
        attrs = dict(op.attrs)
        if op.name == "split_heads":
            attrs["heads"] = self.heads[op.operands[0]] * self.copies.get(op.operands[0], 1)
        made = make(op.name, operands, names, attrs, self.mesh)
        self._keep(made)
        partial = made.type.partial
        if partial and partial.kind == "sum":
            self._collect("all_reduce", made.results, "reduced", axis=partial.axis)
        elif partial and self.helix:
            self._require_cut(made.type.shape[1], PRODUCT, "heads")
            self._collect("merge_scatter", made.results, "merged", axis=partial.axis)
        elif partial:
            self._collect("merge", made.results, "merged", axis=partial.axis)

    def _keep(self, op: Op) -> None:
        self.ops.append(op)
        self.values.update((value.name, value) for value in op.results)

    def _collect(
        self, name: str, values: tuple[Value, ...], suffix: str, **attrs: str | int
    ) -> tuple[Value, ...]:
        """Insert a collective; whoever uses the old names gets its results."""
        results = [f"{value.name}_{suffix}" for value in values]
        op = make(name, values, results, attrs, self.mesh)
        self.ops.append(op)
        for old, new in zip(values, op.results, strict=True):
            self.values[old.name] = new
        return op.results

    def _whole(self, value: Value) -> Value:
        for dim, axis in enumerate(value.type.axes):
            if axis:
                (value,) = self._collect("all_gather", (value,), "gathered", axis=axis, dim=dim)
        return value

    # ---------------------------------------------------------------------------------- placements

    def _place_weights(self, op: Op) -> None:
        for position, name in enumerate(op.operands):
            if name in self.weights:
                weight = self._repeated(self.weights[name], op.results[0].name)
                dim, axis = self._cut(op, position, weight.type)
                axes = tuple(axis if i == dim else None for i in range(len(weight.type.shape)))
                value = Value(name, dataclasses.replace(weight.type, axes=axes))
                self._keep(dataclasses.replace(weight, results=(value,)))

    def _repeated(self, weight: Op, result: str) -> Op:
        """The weight (or bias) of a linear with each KV head's rows as often as ranks hold them."""
        copies = self.copies.get(result, 1)
        if copies == 1:
            return weight
        rows, *columns = weight.type.shape
        type = dataclasses.replace(weight.type, shape=(rows * copies, *columns))
        attrs = {**weight.attrs, "copies": (copies,)}
        return dataclasses.replace(
            weight, attrs=attrs, results=(Value(weight.results[0].name, type),)
        )

    def _cut(self, op: Op, position: int, weight: TensorType) -> tuple[int | None, str | None]:
        """The dim of a weight that is cut, and over what; None and None if it stays whole."""
        if op.name == "linear" and (axis := self.values[op.operands[0]].type.axes[1]):
            return 1, axis
        result = op.results[0].name
        if self.helix and result in self.gates:
            self._require_cut(weight.shape[0], PRODUCT, "FFN columns")
            return 0, PRODUCT
        if self.mesh["tp"] == 1 or op.name not in ("embed", "linear"):
            return None, None
        if op.name == "linear" and result in self.heads:
            self._require_cut(self.heads[result] * self.copies.get(result, 1), "tp", "heads")
            return 0, "tp"
        size = weight.shape[0]
        return (0, "tp") if isinstance(size, int) and size % self.mesh["tp"] == 0 else (None, None)

    def _require_cut(self, count: Size, axis: str, what: str) -> None:
        ranks = degree(axis, self.mesh)
        if count % ranks:
            degrees = ", ".join(f"{name}={self.mesh[name]}" for name in axis.split("_"))
            verb = "do" if axis == PRODUCT else "does"
            raise BadInput(
                f"{degrees} {verb} not divide the {count} {what}", where=self.function.name
            )

    def _cache(self, value: Value) -> Value:
        tp, kvp = ("tp" if self.mesh["tp"] > 1 else None), ("kvp" if self.mesh["kvp"] > 1 else None)
        tokens, two, heads, dim = value.type.shape
        heads *= max(self.copies.values(), default=1)
        shape, axes = (tokens, two, heads, dim), (kvp, None, tp, None)
        return Value(value.name, dataclasses.replace(value.type, shape=shape, axes=axes))

    def _kv_copies(self) -> dict[str, int]:
        """Linear results that become keys or values → ranks that hold each of their heads."""
        producer = {value.name: op for op in self.function.ops for value in op.results}
        tp, copies = self.mesh["tp"], {}
        for append in (op for op in self.function.ops if op.name == "append"):
            for operand in append.operands[1:]:
                linear = producer[operand]
                while linear.name != "linear":
                    linear = producer[linear.operands[0]]
                result = linear.results[0].name
                heads = self.heads[result]
                copies[result] = tp // heads if tp > heads and tp % heads == 0 else 1
        return copies


def _head_counts(function: Function) -> dict[str, int]:
    """Linear results that are split into heads → how many: those are cut at head boundaries."""
    splits = (op for op in function.ops if op.name == "split_heads")
    return {op.operands[0]: heads for op in splits if isinstance(heads := op.attrs["heads"], int)}
