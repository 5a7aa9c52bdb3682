"""Seconds of one micro-batch, from the IR's own counts and the cluster's figures.

For each block of a rank's program and each part that a prediction is broken into, one sympy
expression in the six sizes of `ir.sizes`. With e and h a curve's full share and half size, and g an op's
grain (see `curves` and `ir.ops.Work`):

    matmul, prefill       Max((flops + h·g)/(peak·e), bytes/(bandwidth·e_b))    whichever bounds
    decode                Max(flops/(peak·e), (bytes + h·g)/(bandwidth·e_b))
    memory                (bytes + h·g)/(bandwidth·e)
    all_reduce            2·⌈log2 n⌉·α + 2·(n − 1)/n·bytes/β        up and down a tree; ring traffic
    all_gather            ⌈log2 n⌉·α + (n − 1)/n·bytes/β
                          over tp × kvp: over tp, and of 1/tp of the bytes over kvp, each on its own link
    exchange              α (where there are peers) + bytes/β        pairwise, all at once
    launch                per op that computes: what lies between two ops on the device; and what the host
                          needs to launch them all, where that is more than the device's time

Where memory.shared_bandwidth says what all devices of a node draw together (the cores of a CPU), the tp × kvp
ranks that stream at once draw no more than that: bandwidth·e is at most their share of it.

α and β are those of the link that the axis crosses; α + bytes/β is the same curve as e(x), written the way
people write it for messages. e_b is that of one-row products for matmul, of decode for attention.

The peak is that of the plan's dtype; products of 8-bit floats (`matmul_fp8`) have their own, and their own
curve. An fp8 KV cache means fewer bytes for attention to read, by its type; arithmetic stays in the plan's
dtype, keys and values being unpacked on the way. (FlashAttention-3 can compute in fp8 too, at up to
1.2 PFLOP/s on an H100, arXiv 2407.08608; what that would gain is not counted.)

A host that runs ahead of the device hides its launches behind the kernels: a block takes
Max(device time, ops·overhead.launch) with ops·overhead.launch_captured inside the device's time, which is
all that remains where launches are captured in a graph, as they are unless the plan is eager. Where the host
is the device (a CPU) there is one figure, and it is all inside.

Blocks `embed`, `rotation`, `layer` and `head` are the functions of the module; `step` is what every
micro-batch costs a stage beside its ops (host time), `hop` sends [T, hidden] to the next stage: α + bytes/β.
In the head is, too, what each sequence that gets a token costs beside all ops (`overhead.row`): to sample and
hand it out, and what kernels take longer over several sequences than over one as long as all of them.

From terms, each a row of coefficients or the larger of two, come both the sympy expressions that the
artifact's cost.py prints and, for the search, tables; each plan's re-check compares the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from sympy.printing.pycode import PythonCodePrinter

from ..artifact import Layout
from ..ir.graph import Module
from ..ir.ops import Work, works
from ..ir.sizes import KD, QK, SYMBOLS, R, Size, X, any_of
from .chunks import Floats, Sizes
from .cluster import Cluster

BLOCKS = ("step", "embed", "rotation", "layer", "head", "hop")
FUNCTIONS = ("embed", "rotation", "layer", "head")
PARTS = ("linear", "attention", "communication", "launch", "other")

Row = tuple[float, ...]
"""Coefficients of an affine size or time: of 1, of each symbol, and of `any_of` those that gate."""

BASIS: tuple[sympy.Expr, ...] = (sympy.S.One, *SYMBOLS, any_of(QK), any_of(KD), any_of(X))


@dataclass(frozen=True)
class Formula:
    """One block: part → seconds on the device, in the symbols of `ir.sizes`, and what its launches take
    the host. The block takes the longer of the two; what the host takes more counts as launch.
    """

    parts: Mapping[str, sympy.Expr]
    host_s: float


StageFormulas = Mapping[str, Formula]
"""block → formula."""


@dataclass(frozen=True)
class Links:
    """Which link each axis crosses: "intra" a node or "inter" nodes. tp never leaves its node."""

    kvp: str
    spp: str


@dataclass(frozen=True)
class Task:
    """One work of one op, counted; `launches`: kernel launches that it stands for."""

    part: str
    resource: str
    axis: str | None
    flops: Row
    bytes: Row
    grain: Row
    launches: int


@dataclass(frozen=True)
class Term:
    """Seconds of one work: the larger of two affine functions, or one alone."""

    part: str
    rows: tuple[Row, ...]

    def seconds(self) -> sympy.Expr:
        sides = [_expression(row) for row in self.rows]
        return sides[0] if len(sides) == 1 else sympy.Max(*sides, evaluate=False)


@dataclass(frozen=True)
class Block:
    """What a block does on the device, and what its launches take the host."""

    terms: tuple[Term, ...]
    host_s: float = 0.0


Terms = Mapping[str, Block]
"""block name → block."""


def links_of(layout: Layout, cluster: Cluster) -> Links:
    """Ranks lie tp innermost, then kvp, then spp: an axis stays inside a node while its span fits."""
    per_node, span = cluster.devices_per_node, layout.kvp * layout.tp
    fits = layout.gpus <= per_node
    kvp = "intra" if fits or layout.kvp == 1 or per_node % span == 0 else "inter"
    return Links(kvp, "intra" if fits or layout.spp == 1 else "inter")


def count(module: Module) -> Mapping[str, tuple[Task, ...]]:
    """What one rank does in each function of a sharded, fused module, and in a hop."""
    mesh = module.mesh
    tasks: dict[str, tuple[Task, ...]] = {}
    for name in FUNCTIONS:
        function = module.functions[name]
        done = [works(op, function, mesh) for op in function.ops]
        tasks[name] = tuple(task for op_works in done for task in _tasks(op_works))
    hidden = module.functions["embed"].result_types[0].local_bytes(mesh)
    tasks["hop"] = tuple(_tasks((Work("communication", "hop", 0, hidden, "spp"),)))
    return tasks


def _tasks(op_works: tuple[Work, ...]) -> Iterator[Task]:
    """The works of one op; the first that is no collective stands for the op's launch."""
    launches = 1
    for work in op_works:
        launched = launches if work.axis is None else 0
        launches -= launched
        flops, moved, grain = (_row(size) for size in (work.flops, work.bytes, work.grain))
        yield Task(work.part, work.resource, work.axis, flops, moved, grain, launched)


def _row(size: Size) -> Row:
    if isinstance(size, int):
        return (float(size),) + (0.0,) * (len(BASIS) - 1)
    terms = sympy.expand(size).as_coefficients_dict()
    row = tuple(float(terms.get(key, 0)) for key in BASIS)
    assert sum(value != 0 for value in row) == len(terms), f"{size} is not affine"
    return row


def _expression(row: Row) -> sympy.Expr:
    pairs = zip(row, BASIS, strict=True)
    return sympy.Add(*(sympy.Float(value) * base for value, base in pairs if value))


def _sum(*weighed: tuple[float, Row]) -> Row:
    """Σ weight·row."""
    return tuple(sum(w * row[i] for w, row in weighed) for i in range(len(BASIS)))


def price_terms(
    tasks: Mapping[str, tuple[Task, ...]],
    cluster: Cluster,
    dtype: str,
    mesh: Mapping[str, int],
    links: Links,
    *,
    eager: bool = False,
) -> Terms:
    """Seconds for what was counted."""
    crossed = {"tp": "intra", "kvp": links.kvp, "spp": links.spp}
    pricer = _Pricer(cluster, dtype, mesh, crossed, eager)
    blocks = {name: pricer.block(tasks[name]) for name in tasks}
    if "overhead.row" in cluster.numbers:
        head, row = blocks["head"], _launch((cluster["overhead.row"], _row(R)))
        blocks["head"] = dataclasses.replace(head, terms=(*head.terms, row))
    step = _launch((cluster["overhead.iteration"], _row(1)))
    return {"step": Block((step,)), **blocks}


def _launch(*seconds: tuple[float, Row]) -> Term:
    return Term("launch", (_sum(*seconds),))


def stage_formulas(terms: Terms) -> StageFormulas:
    """Terms as expressions, by block and part."""
    return {
        name: Formula(
            {
                part: sympy.Add(*(t.seconds() for t in block.terms if t.part == part))
                for part in PARTS
            },
            block.host_s,
        )
        for name, block in ((name, terms[name]) for name in BLOCKS)
    }


def tabulate(terms: Terms) -> Callable[[Sizes], Mapping[str, Floats]]:
    """sizes → seconds by block, as two products with tables of coefficients."""
    upper: list[Row] = []
    lower: list[Row] = []
    ranges: dict[str, tuple[int, int]] = {}
    for name in BLOCKS:
        first = len(upper)
        for term in terms[name].terms:
            if len(term.rows) == 2:
                upper.append(term.rows[0])
                lower.append(term.rows[1])
        plain = _sum(*((1.0, t.rows[0]) for t in terms[name].terms if len(t.rows) == 1))
        upper.append(plain)
        lower.append(plain)
        ranges[name] = (first, len(upper))
    uppers, lowers = np.array(upper), np.array(lower)
    host_s = {name: terms[name].host_s for name in BLOCKS}
    symbols = [str(symbol) for symbol in SYMBOLS]

    def evaluate(sizes: Sizes) -> Mapping[str, Floats]:
        shape = sizes.T.shape
        columns = [np.ones(shape), *(getattr(sizes, symbol) for symbol in symbols)]
        columns += [np.minimum(gate, 1) for gate in (sizes.QK, sizes.KD, sizes.X)]
        table = np.stack(columns).reshape(len(columns), -1)
        seconds = np.maximum(uppers @ table, lowers @ table)
        totals = {name: seconds[i:j].sum(axis=0) for name, (i, j) in ranges.items()}
        return {n: np.maximum(total, host_s[n]).reshape(shape) for n, total in totals.items()}

    return evaluate


def compile_totals(formulas: StageFormulas) -> Callable[[Sizes], Mapping[str, Floats]]:
    """sizes → seconds by block, vectorised."""
    names = list(formulas)
    totals = [sympy.Add(*formulas[name].parts.values()) for name in names]
    evaluate = _compile(totals)

    def blocks(sizes: Sizes) -> Mapping[str, Floats]:
        pairs = zip(names, evaluate(sizes), strict=True)
        return {name: np.maximum(total, formulas[name].host_s) for name, total in pairs}

    return blocks


def compile_parts(formulas: StageFormulas) -> Callable[[Sizes], Mapping[str, Mapping[str, Floats]]]:
    """sizes → seconds by block and part, vectorised."""
    keys = [(block, part) for block in formulas for part in PARTS]
    evaluate = _compile([formulas[block].parts[part] for block, part in keys])

    def parts(sizes: Sizes) -> Mapping[str, Mapping[str, Floats]]:
        result: dict[str, dict[str, Floats]] = defaultdict(dict)
        for (block, part), seconds in zip(keys, evaluate(sizes), strict=True):
            result[block][part] = seconds
        for block, by_part in result.items():
            waits = formulas[block].host_s - sum(by_part.values())
            by_part["launch"] = by_part["launch"] + np.maximum(waits, 0)
        return result

    return parts


def _compile(expressions: list[sympy.Expr]) -> Callable[[Sizes], list[Floats]]:
    """The expressions as one numpy function, through the text that cost.py holds too."""
    printer = PythonCodePrinter({"fully_qualified_modules": False})
    texts = ", ".join(map(printer.doprint, expressions))
    names = ", ".join(str(symbol) for symbol in SYMBOLS)
    scope: dict[str, Any] = {"max": np.maximum, "min": np.minimum}
    function = eval(f"lambda {names}: ({texts},)", scope)

    def evaluate(sizes: Sizes) -> list[Floats]:
        columns = [getattr(sizes, str(symbol)) for symbol in SYMBOLS]
        return [np.broadcast_to(y, columns[0].shape) for y in function(*columns)]

    return evaluate


_CURVES: Mapping[str, tuple[str | None, str]] = {
    "memory": (None, "memory"),
    "matmul": ("matmul", "memory"),
    "matmul_fp8": ("matmul_fp8", "memory"),
    "attention_prefill": ("attention_prefill", "attention_decode"),
    "attention_decode": ("attention_prefill", "attention_decode"),
}
"""resource → the curve of its arithmetic, and the curve of its streaming."""

_PEAKS: Mapping[str, str] = {"matmul_fp8": "peak.float8"}
"""resource → the peak of its arithmetic, where that is not of the plan's dtype."""


@dataclass(frozen=True)
class _Pricer:
    cluster: Cluster
    dtype: str
    mesh: Mapping[str, int]
    links: Mapping[str, str]
    eager: bool

    def block(self, tasks: Sequence[Task]) -> Block:
        launches = sum(task.launches for task in tasks)
        between_s, host_s = launches * self.cluster["overhead.launch"], 0.0
        if "overhead.launch_captured" in self.cluster.numbers:
            host_s = between_s if self.eager else 0.0
            between_s = launches * self.cluster["overhead.launch_captured"]
        priced = (
            self._local(task) if task.axis is None else self._remote(task, task.axis)
            for task in tasks
        )
        return Block((_launch((between_s, _row(1))), *priced), host_s)

    def _local(self, task: Task) -> Term:
        compute, stream = _CURVES[task.resource]
        curve = self.cluster.curve(stream)
        byte_s = 1 / (self.cluster["memory.bandwidth"] * curve.full)
        half_s = byte_s * curve.half if task.resource == stream else 0.0
        streaming = _sum((max(byte_s, self._shared_byte_s()), task.bytes), (half_s, task.grain))
        if compute is None:
            return Term(task.part, (streaming,))
        curve = self.cluster.curve(compute)
        peak = self.cluster[_PEAKS.get(compute, f"peak.{self.dtype}")]
        flop_s = 1 / (peak * curve.full)
        half = curve.half if task.resource == compute else 0.0
        return Term(task.part, (_sum((flop_s, task.flops), (flop_s * half, task.grain)), streaming))

    def _shared_byte_s(self) -> float:
        """Seconds per byte of a rank's share of its node's memory; 0 where it has its own."""
        if "memory.shared_bandwidth" not in self.cluster.numbers:
            return 0.0
        at_once = min(self.mesh["tp"] * self.mesh["kvp"], self.cluster.devices_per_node)
        return at_once / self.cluster["memory.shared_bandwidth"]

    def _remote(self, task: Task, axis: str) -> Term:
        latency_s, byte_s, share = 0.0, 0.0, 1.0
        for name in axis.split("_"):
            alpha, beta = self._link(name)
            if task.resource in ("all_reduce", "all_gather"):
                ranks = self.mesh[name]
                rounds = 2 if task.resource == "all_reduce" else 1
                alpha *= rounds * math.ceil(math.log2(ranks))
                beta *= rounds * (ranks - 1) / ranks * share
                share /= ranks
            latency_s += alpha
            byte_s += beta
        return Term(task.part, (_sum((latency_s, task.grain), (byte_s, task.bytes)),))

    def _link(self, axis: str) -> tuple[float, float]:
        """Seconds of latency, and per byte, of the link that an axis crosses."""
        link = self.links[axis]
        rate = self.cluster[f"links.{link}.bandwidth"] * self.cluster["efficiency.link"]
        return self.cluster[f"links.{link}.latency"], 1 / rate
