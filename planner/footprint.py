"""Bytes that one rank holds, from the types in the sharded module and from how its emitted program runs.

Weights and KV pages are there always. What a micro-batch of T rows (R of them with logits, X partial rows
swapped with KVP peers, KV cached keys read by its chunks) needs beside them comes and goes, in three parts:

activation      what ops make. A function's values live until it returns, for its names hold them; with them
                the stage's first rows, what the function was given, and the rotation of the positions
workspace       of kernels: on a GPU the partial results of split keys (`SPLIT_ROWS`); on a CPU the copies in
                which attention lays its rows out anew and, where a request's pages are scattered, one layer's
                keys and values gathered. The batch itself and the next one, which is prepared meanwhile:
                ids, positions and slots. And, from step to step, prompts as token ids and page tables
                with the copies that the runtime keeps
communication   partial results on their way to and from the peers; the pieces of what is gathered; the next
                micro-batch's rows, which arrive meanwhile; rows sent on, of which the runtime keeps p + 1
                micro-batches until they have left; and what the communication library allocates for
                itself per process group, and the buffers that tp peers read

A rank needs most at one moment of its program: `Moment` is one, and `Footprint.step` takes the dearest for
each micro-batch. Every stage is counted as if it embedded, had the head and sent on. Rows still on
their way are counted as those of the chunk that is computed; where chunks shrink, the first ones were larger,
but so was all else that they needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np
import sympy

from ..ir.graph import Function, Module, Op
from ..ir.ops import works
from ..ir.ops.attention import SPLIT_ROWS
from ..ir.sizes import KV, R, Size, T, X
from .chunks import Floats, Sizes
from .space import Growth

Mesh = Mapping[str, int]

_BATCH_BYTES = 2 * 3 * 8
"""Of a row: its id, its position and the slot of its key, as int64; of this batch and of the next."""

_SWAP_BYTES = 2 * 2 * 8
"""Of a row that is swapped: its place in the batch, to send and to receive; in both batches."""

_JOINED_BYTES, _PLACE_BYTES = 8 + 4, 4
"""The rows for all peers as one list, and places of rows among those received, by which they are merged."""

_ID_BYTES, _PAGE_ID_BYTES = 8, 4

_TABLES = 9
"""Page tables: each request's own, and those of up to 8 sets of requests that ran together."""


@dataclass(frozen=True)
class Need:
    """Bytes that grow with a micro-batch, term by term."""

    fixed: int
    per_row: int
    per_logit_row: int
    per_key: int
    per_peer_row: int

    def __call__(self, sizes: Sizes) -> Floats:
        """A prompt's last chunk has a row with logits, even where `sizes` leaves them to be counted apart."""
        rows = sizes.T * self.per_row + np.maximum(sizes.R, 1) * self.per_logit_row
        return np.asarray(self.fixed + rows + sizes.KV * self.per_key + sizes.X * self.per_peer_row)

    def within(self, other: Need) -> bool:
        """No micro-batch needs more of this than of the other."""
        return all(a <= b for a, b in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment of its program, beside weights, KV and what it always holds."""

    activation: Need
    workspace: Need
    communication: Need

    @cached_property
    def total(self) -> Need:
        parts = map(astuple, (self.activation, self.workspace, self.communication))
        return Need(*(sum(terms) for terms in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Step:
    """Bytes that a rank needs for each of some micro-batches [N], beside weights and KV."""

    activation: Floats
    workspace: Floats
    communication: Floats

    @property
    def parts(self) -> tuple[Floats, Floats, Floats]:
        return self.activation, self.workspace, self.communication

    @property
    def total(self) -> Floats:
        return np.asarray(sum(self.parts))


@dataclass(frozen=True)
class Kept:
    """Bytes that a rank holds from step to step."""

    workspace: int
    communication: int


@dataclass(frozen=True)
class Footprint:
    """Bytes per rank: weights by block, KV per token and layer, and the moments at which steps need most.

    per_sent_row: of a row on its way from one stage to the next
    """

    embed: int
    layer: int
    head: int
    kv_per_token: int
    moments: tuple[Moment, ...]
    per_sent_row: int

    def step(self, sizes: Sizes, stages: int, kept: Kept) -> Step:
        """What micro-batches of these sizes need on a rank of a pipeline of so many stages."""
        sizes = Sizes(*(np.atleast_1d(counts) for counts in vars(sizes).values()))
        dearest = np.stack([moment.total(sizes) for moment in self.moments]).argmax(axis=0)
        sent = sizes.T * self.sent_bytes(stages)
        activation, workspace, communication = (
            np.choose(dearest, [getattr(moment, part)(sizes) for moment in self.moments])
            for part in ("activation", "workspace", "communication")
        )
        return Step(
            activation, workspace + kept.workspace, communication + sent + kept.communication
        )

    def step_bytes(self, sizes: Sizes, stages: int, kept: Kept) -> Floats:
        """The same, all in all."""
        dearest = np.maximum.reduce([moment.total(sizes) for moment in self.moments])
        sent = sizes.T * self.sent_bytes(stages)
        return np.asarray(dearest + sent + kept.workspace + kept.communication)

    def sent_bytes(self, stages: int) -> int:
        """Of each row: what is on its way from and to other stages while another one is computed."""
        receives = stages > 2  # of two stages none does both
        return self.per_sent_row * (stages + 1 + receives) if stages > 1 else 0


def kept(tokens: int, growth: Growth, group_bytes: int) -> Kept:
    """Token ids of prompts of so many tokens, page tables, buffers of process groups."""
    ids, tables = _ID_BYTES * tokens * growth.concurrency, _PAGE_ID_BYTES * _TABLES * growth.pages
    return Kept(ids + tables, group_bytes)


def kept_per_page(growth: Growth) -> int:
    """Of one more page on each group: its tokens' ids, which all groups know, and its place in tables."""
    return _ID_BYTES * growth.kvp * growth.page_size + _PAGE_ID_BYTES * _TABLES


def footprint(module: Module, target: str) -> Footprint:
    """Bytes per rank: weights by block, KV per token and layer, and what a step needs on a target."""
    functions, mesh = module.functions, module.mesh
    layer = functions["layer"]
    (cache,) = (op.type for op in layer.ops if op.name == "cache")
    _, two, kv_heads, dim = cache.local_shape(mesh)
    (row,), (rotation,) = (functions[name].result_types for name in ("embed", "rotation"))
    row_bytes = row.local_bytes(mesh)
    held = row_bytes + rotation.local_bytes(mesh)
    moments = [
        moment
        for function in functions.values()
        if function.name != "rotation"
        for moment in _moments(function, mesh, target, held + _given(function, mesh))
    ]
    return Footprint(
        embed=_weight_bytes(functions["embed"], mesh),
        layer=_weight_bytes(layer, mesh),
        head=_weight_bytes(functions["head"], mesh),
        kv_per_token=int(two) * int(kv_heads) * int(dim) * cache.itemsize,
        moments=_dearest(moments),
        per_sent_row=int(sympy.expand(row_bytes).coeff(T)),
    )


def _given(function: Function, mesh: Mesh) -> Size:
    """Rows that a function takes, with what is known of each; ids and rotations are counted elsewhere."""
    types = (value.type for value in function.params)
    return sum(t.local_bytes(mesh) for t in types if _has_rows(t.shape) and len(t.shape) == 2)


def _dearest(moments: list[Moment]) -> tuple[Moment, ...]:
    """Without those that another one always exceeds."""
    kept: list[Moment] = []
    for moment in moments:
        if not any(moment.total.within(other.total) for other in kept):
            kept = [other for other in kept if not other.total.within(moment.total)] + [moment]
    return tuple(kept)


def _moments(function: Function, mesh: Mesh, target: str, carried: Size) -> Iterator[Moment]:
    """Each op that needs something for a while, and the function's end."""
    batch = T * _BATCH_BYTES + X * _SWAP_BYTES
    if mesh["kvp"] > 1:
        batch += X * _JOINED_BYTES + T * (mesh["kvp"] - 1) * _PLACE_BYTES
    made, travelling = carried, 0  # what travels has a name, too, until the function returns
    for op in function.ops:
        made += _made(op, function, mesh, target)
        travelling += 2 * _swapped(op, function, mesh) if op.name.startswith("exchange") else 0
        workspace, communication = _passing(op, function, mesh, target)
        if workspace != 0 or communication != 0:
            passing = _need(travelling + communication)
            yield Moment(_need(made), _need(batch + workspace), passing)
    yield Moment(_need(made), _need(batch), _need(travelling))


def _swapped(op: Op, function: Function, mesh: Mesh) -> Size:
    """Bytes of partial results that an op sends; it receives as many."""
    return sum(w.bytes for w in works(op, function, mesh) if w.resource == "exchange")


def _made(op: Op, function: Function, mesh: Mesh, target: str) -> Size:
    """What stays of an op until its function returns; nothing of one that is written over its operand."""
    if op.name in (
        "param",
        "cache",
        "merge_heads",
        "all_reduce",
        "all_reduce_add",
        "merge",
        "merge_scatter",
        "halve",
    ):
        return 0
    if op.name.startswith("exchange"):
        return 0  # what it holds is communication
    if op.name == "add" and function.is_spent(op.operands[0], op):
        return 0
    made = sum(value.type.local_bytes(mesh) for value in op.results if _has_rows(value.type.shape))
    if op.name == "rope_append" and target == "cpu":
        _, _, kv_heads, dim = function.types[op.results[1].name].local_shape(mesh)
        made += T * kv_heads * dim * op.type.itemsize  # keys are turned together with the queries
    return made


def _has_rows(shape: tuple[Size, ...]) -> bool:
    return shape[0] in (T, T / 2, R)


def _passing(op: Op, function: Function, mesh: Mesh, target: str) -> tuple[Size, Size]:
    """Workspace and communication buffers of an op, gone when it is done."""
    if op.name == "attend":
        return _attend_workspace(op, function, mesh, target), 0
    if op.name in ("merge", "merge_scatter"):
        swapped = _swapped(op, function, mesh)
        _, heads, dim = op.type.local_shape(mesh)
        copied = (
            op.type.shape[0] * heads * (dim + 4) * 4 if target == "cpu" else 0
        )  # of one peer at a time
        return copied, 2 * swapped
    if op.name == "all_gather":
        return 0, op.type.local_bytes(mesh)
    if op.name == "embed" and op.type.partial:
        return op.type.local_bytes(mesh) + T * 17, 0  # rows before those of other ranks are masked
    return 0, 0


def _attend_workspace(op: Op, function: Function, mesh: Mesh, target: str) -> Size:
    _, heads, dim = op.type.local_shape(mesh)
    if target != "cpu":
        return SPLIT_ROWS * (dim + 1) * 4
    cache = function.types[op.operands[1]]
    _, two, kv_heads, _ = cache.local_shape(mesh)
    gathered = KV * two * kv_heads * dim * cache.itemsize
    return (
        gathered + op.type.shape[0] * heads * (3 * dim + 6) * 4
    )  # of the past, of the chunk, and weighed


def _need(size: Size) -> Need:
    terms = sympy.expand(size).as_coefficients_dict()
    return Need(*(math.ceil(float(terms.get(unit, 0))) for unit in (sympy.S.One, T, R, KV, X)))


def _weight_bytes(function: Function, mesh: Mesh) -> int:
    return sum(int(op.type.local_bytes(mesh)) for op in function.ops if op.name == "param")
