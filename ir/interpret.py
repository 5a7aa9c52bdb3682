"""The interpreter: evaluates any module, also a sharded and staged one as N simulated ranks.

It is the oracle. Values are numpy arrays, one per rank of the mesh; collectives are list operations;
the KV cache is a list of positions with their keys and values, so no paging, no chunk schedule and no
kernel is shared with what it checks. For every layout, `interpret(apply(m, plan)) == interpret(m)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import Call, Function, Module, Op, Program, layers_ahead, sources_and_copies
from .ops import OPS
from .ops.attention import merge_partials
from .ops.dense import halves
from .types import degree

Array = NDArray[Any]
Coordinate = tuple[int, int]  # (kvp group, tp rank)

_KEYS_AT_ONCE = 1 << 22  # elements of one block of scores: bounds memory at long context


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence in a micro-batch: token ids at positions start, start + 1, …"""

    sequence: int
    start: int
    ids: tuple[int, ...]


@dataclass
class _Shard:
    """Keys and values of one sequence on one rank: [n, G, d], with their positions [n]."""

    positions: list[Array] = field(default_factory=list)
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)


class Interpreter:
    """A module with its weights and the KV caches of all simulated ranks.

    weights:  checkpoint tensors by name, as arrays
    owner:    (sequence, position) → KVP group that stores it; all on group 0 by default
    dtype:    of all arithmetic (float64 unless said otherwise)
    """

    def __init__(
        self,
        module: Module,
        weights: Mapping[str, Array],
        owner: Callable[[int, int], int] = lambda sequence, position: 0,
        dtype: Any = np.float64,
    ) -> None:
        self.module, self.weights, self.owner = module, weights, owner
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.ranks: list[Coordinate] = [
            (group, tp) for group in range(module.mesh["kvp"]) for tp in range(module.mesh["tp"])
        ]
        self.halved = False
        self.caches: dict[tuple[int, Coordinate, int], _Shard] = {}

    def run(self, chunks: Sequence[Chunk], rows: Sequence[int], *, halved: bool = False) -> Array:
        """One step: the logits [R, V] of the given rows; the chunks' keys and values are kept.

        halved: whether its rows, of which there are then at least two, go through layers in two halves
        """
        self.halved = halved
        ids = np.array([token for chunk in chunks for token in chunk.ids], dtype=np.int64)
        pos = np.concatenate([np.arange(c.start, c.start + len(c.ids)) for c in chunks])
        inputs = {"ids": ids, "pos": pos, "last": np.array(rows, dtype=np.int64)}
        values = {name: [array] * len(self.ranks) for name, array in inputs.items()}
        for program in self.module.programs:
            values = self._run_program(program, values, chunks)
        logits = values[self.module.programs[-1].returns[0]]
        return np.asarray(logits[0])

    def _run_program(
        self, program: Program, values: dict[str, list[Array]], chunks: Sequence[Chunk]
    ) -> dict[str, list[Array]]:
        values = {k.removesuffix("_in"): v for k, v in values.items()}
        local = {v.name: values[v.name.removesuffix("_in")] for v in program.params}
        for call in program.calls:
            self._run_call(call, local, chunks)
        batch = {name: values[name] for name in ("ids", "pos", "last")}
        return batch | {name: local[name] for name in program.returns}

    def _run_call(
        self, call: Call, values: dict[str, list[Array]], chunks: Sequence[Chunk]
    ) -> None:
        name = call.halved if self.halved and call.halved else call.function
        function = self.module.functions[name]
        operands = [values[name] for name in call.operands]
        for layer in range(*call.layers) if call.layers else (-1,):
            results = self._run_function(function, operands, layer, chunks)
            operands[: len(results)] = results
        values.update(zip(call.results, results, strict=True))

    def _run_function(
        self, function: Function, operands: list[list[Array]], layer: int, chunks: Sequence[Chunk]
    ) -> list[list[Array]]:
        values = {p.name: o for p, o in zip(function.params, operands, strict=True)}
        sites = [_Site(self, rank, layer, chunks) for rank in self.ranks]
        for op in function.ops:
            args = [[values[name][i] for name in op.operands] for i in range(len(self.ranks))]
            by_rank = self._evaluate(op, args, sites)
            for position, value in enumerate(op.results):
                values[value.name] = [results[position] for results in by_rank]
        return [values[name] for name in function.returns]

    def _evaluate(
        self, op: Op, args: list[list[Array]], sites: list[_Site]
    ) -> list[tuple[Array, ...]]:
        definition = OPS[op.name]
        given: Sequence[Sequence[Array]] = args
        if definition.collective is not None:
            found: dict[int, tuple[Array, ...]] = {}
            for peers in self._along(str(op.attrs["axis"])):
                shared = definition.collective(op, [args[i] for i in peers])
                found.update(zip(peers, shared, strict=True))
            given = collected = [found[i] for i in range(len(self.ranks))]
            if definition.evaluate is None:
                return collected
        assert definition.evaluate is not None
        return [definition.evaluate(op, a, s) for a, s in zip(given, sites, strict=True)]

    def _along(self, axis: str) -> Sequence[list[int]]:
        """The ranks, as indices, in one list for each collective over the axis, in its order."""
        names, lists = axis.split("_"), defaultdict(list)
        for i, (group, tp_rank) in sorted(enumerate(self.ranks), key=lambda item: item[1][::-1]):
            apart = (group if "kvp" not in names else -1, tp_rank if "tp" not in names else -1)
            lists[apart].append(i)
        return list(lists.values())


@dataclass(frozen=True)
class _Site:
    """One simulated rank in one layer: what ops ask for (see `ops.base.Rank`)."""

    interpreter: Interpreter
    rank: Coordinate
    layer: int
    chunks: Sequence[Chunk]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.interpreter.dtype

    @property
    def tp_rank(self) -> int:
        return self.rank[1]

    def parameter(self, op: Op) -> Array:
        """This rank's piece of each source, joined along dim 0."""
        dim, axis = next(((i, axis) for i, axis in enumerate(op.type.axes) if axis), (None, ""))
        ranks, rank = self._place(axis) if axis else (1, 0)
        layer, pieces = self.layer + layers_ahead(op), []
        for source, copies in zip(*sources_and_copies(op), strict=True):
            whole = self.interpreter.weights[str(source).format(layer=layer)]
            if dim is not None:
                whole = np.split(whole, ranks // copies, axis=dim)[rank // copies]
            pieces.append(whole.astype(self.dtype))
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _place(self, axis: str) -> tuple[int, int]:
        """How many ranks the axis has, and this one's number along it."""
        mesh, number = self.interpreter.module.mesh, 0
        for name in axis.split("_"):
            number = number * mesh[name] + (self.tp_rank if name == "tp" else self.rank[0])
        return degree(axis, mesh), number

    def cache(self) -> str:
        return "kv"  # state lives in the interpreter; the value only orders append before attend

    def append(self, keys: Array, values: Array) -> str:
        """Keep the rows that this group owns."""
        for rows, chunk in self._rows():
            positions = np.arange(chunk.start, chunk.start + len(chunk.ids))
            owner = self.interpreter.owner
            mine = np.array([owner(chunk.sequence, int(p)) == self.rank[0] for p in positions])
            shard = self._shard(chunk.sequence)
            shard.positions.append(positions[mine])
            shard.keys.append(keys[rows][mine])
            shard.values.append(values[rows][mine])
        return "kv"

    def attend(self, queries: Array, half: int | None) -> tuple[Array, Array]:
        """Causal attention of all queries, or of one half of them, over the local shard: (out, lse)."""
        chunks = [chunk for _, chunk in self._rows()]
        pos = np.concatenate([np.arange(c.start, c.start + len(c.ids)) for c in chunks])
        whose = np.repeat(np.arange(len(chunks)), [len(c.ids) for c in chunks])
        if half is not None:
            pos, whose = halves(pos)[half], halves(whose)[half]
        parts = [
            self._attend_chunk(queries[whose == i], chunk, pos[whose == i])
            for i, chunk in enumerate(chunks)
            if (whose == i).any()
        ]
        return np.concatenate([out for out, _ in parts]), np.concatenate([lse for _, lse in parts])

    def _attend_chunk(self, q_Thd: Array, chunk: Chunk, pos: Array) -> tuple[Array, Array]:
        shard = self._shard(chunk.sequence)
        key_pos, keys, values = map(np.concatenate, (shard.positions, shard.keys, shard.values))
        group = q_Thd.shape[1] // keys.shape[1] if keys.shape[1] else 1
        block = max(1, _KEYS_AT_ONCE // (q_Thd.shape[0] * q_Thd.shape[1]))
        parts = []
        for i in range(0, max(1, len(key_pos)), block):
            k, v = (np.repeat(x[i : i + block], group, axis=1) for x in (keys, values))
            scores = np.einsum("thd,nhd->htn", q_Thd, k) * q_Thd.shape[2] ** -0.5
            visible = key_pos[None, i : i + block] <= pos[:, None]
            parts.append(_softmax_values(np.where(visible, scores, -np.inf), v))
        return merge_partials(parts)

    def _rows(self) -> list[tuple[slice, Chunk]]:
        ends = np.cumsum([len(chunk.ids) for chunk in self.chunks])
        return [
            (slice(int(end) - len(c.ids), int(end)), c)
            for end, c in zip(ends, self.chunks, strict=True)
        ]

    def _shard(self, sequence: int) -> _Shard:
        key = (self.layer, self.rank, sequence)
        return self.interpreter.caches.setdefault(key, _Shard())


def _softmax_values(scores_HTN: Array, values_NHd: Array) -> tuple[Array, Array]:
    """Softmax-weighted values: out [T, H, d] and lse [T, H]; rows that see nothing: 0 and −inf."""
    peak = scores_HTN.max(axis=2, keepdims=True, initial=-np.inf)
    finite = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(scores_HTN - finite)
    total = weights.sum(axis=2, keepdims=True)
    out = np.einsum("htn,nhd->thd", weights / np.where(total > 0, total, 1), values_NHd)
    with np.errstate(divide="ignore"):
        return out, (finite + np.log(total))[..., 0].T
