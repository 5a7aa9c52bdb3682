"""Seconds of one micro-batch, from the IR's own counts and the cluster's figures.

For each block of a rank's program and each part that a prediction is broken into, one sympy
expression in the six sizes of `ir.sizes`:

    matmul, attention     Max(flops / (peak·e), bytes / (bandwidth·e_b)) on a GPU; on a CPU their sum, for
                          a core's loads and arithmetic take turns (decode attention: bytes alone, for
                          its e_b is measured with the arithmetic in it)
    memory                bytes / (bandwidth·e)
    all_reduce            2·⌈log2 n⌉·α + 2·(n − 1)/n·bytes/β        up and down a tree; ring traffic
    all_gather            ⌈log2 n⌉·α + (n − 1)/n·bytes/β
    exchange              α (where there are peers) + bytes/β        pairwise, all at once
    launch                one kernel launch per op that computes

Blocks `embed`, `rotation`, `layer` and `head` are the functions of the module; `step` is what every
micro-batch costs a stage beside its ops (host time), `hop` sends [T, hidden] to the next stage: α + bytes/β.

α and β are those of the link that the axis crosses; e, e_b shares that are reached. Each line above is a
`Term`. From terms come both the sympy expressions that the artifact's cost.py prints and, for the search, a
table of coefficients (every count is affine in the sizes); each plan's re-check compares the two.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.printing.pycode import PythonCodePrinter

from ..artifact import Layout
from ..ir.graph import Module
from ..ir.ops import Work, works
from ..ir.sizes import SYMBOLS, Size, X
from .chunks import Floats, Sizes
from .cluster import Cluster

BLOCKS = ("step", "embed", "rotation", "layer", "head", "hop")
FUNCTIONS = ("embed", "rotation", "layer", "head")
PARTS = ("linear", "attention", "communication", "launch", "other")

StageFormulas = Mapping[str, Mapping[str, sympy.Expr]]
"""block → part → seconds, in the symbols of `ir.sizes`."""


@dataclass(frozen=True)
class Links:
    """Which link each axis crosses: "intra" a node or "inter" nodes. tp never leaves its node."""

    kvp: str
    spp: str


@dataclass(frozen=True)
class Count:
    """A size with its affine coefficients: of 1 and of each symbol."""

    size: Size
    row: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """One work of one op, counted; `launches`: kernel launches that it stands for."""

    part: str
    resource: str
    axis: str | None
    flops: Count
    bytes: Count
    launches: int


@dataclass(frozen=True)
class Term:
    """Max(flops·flop_s, bytes·byte_s) + fixed_s; fixed_s only where there are peers, if `gated`.

    serial: the two are not overlapped, and add up
    """

    part: str
    flops: Count
    flop_s: float
    bytes: Count
    byte_s: float
    fixed_s: float = 0.0
    gated: bool = False
    serial: bool = False

    def seconds(self) -> sympy.Expr:
        moved = self.bytes.size * sympy.Float(self.byte_s)
        if self.flop_s:
            busy = self.flops.size * sympy.Float(self.flop_s)
            moved = busy + moved if self.serial else sympy.Max(busy, moved, evaluate=False)
        gate = sympy.Min(1, X, evaluate=False) if self.gated else 1
        return moved + gate * sympy.Float(self.fixed_s)


Terms = Mapping[str, tuple[Term, ...]]
"""block → terms."""


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
        flops, moved = _count(work.flops), _count(work.bytes)
        launched = launches if work.axis is None else 0
        launches -= launched
        yield Task(work.part, work.resource, work.axis, flops, moved, launched)


def _count(size: Size) -> Count:
    if isinstance(size, int):
        return Count(size, (float(size),) + (0.0,) * len(SYMBOLS))
    terms = sympy.expand(size).as_coefficients_dict()
    row = tuple(float(terms.get(key, 0)) for key in (sympy.S.One, *SYMBOLS))
    assert sum(value != 0 for value in row) == len(terms), f"{size} is not affine"
    return Count(size, row)


def price_terms(
    tasks: Mapping[str, tuple[Task, ...]],
    cluster: Cluster,
    dtype: str,
    mesh: Mapping[str, int],
    links: Links,
) -> Terms:
    """Seconds for what was counted."""
    pricer = _Pricer(cluster, dtype, mesh, {"tp": "intra", "kvp": links.kvp, "spp": links.spp})
    blocks = {name: tuple(pricer.terms(tasks[name])) for name in tasks}
    return {"step": (pricer.fixed(cluster["overhead.iteration"]),), **blocks}


def stage_formulas(terms: Terms) -> StageFormulas:
    """Terms as expressions, by block and part."""
    return {
        block: {
            part: sympy.Add(*(t.seconds() for t in terms[block] if t.part == part))
            for part in PARTS
        }
        for block in BLOCKS
    }


def tabulate(terms: Terms) -> Callable[[Sizes], Mapping[str, Floats]]:
    """sizes → seconds by block, as two products with tables of coefficients."""
    upper: list[NDArray[np.float64]] = []
    lower: list[NDArray[np.float64]] = []
    ranges: dict[str, tuple[int, int]] = {}
    for block in BLOCKS:
        first = len(upper)
        plain = np.zeros(len(SYMBOLS) + 2)
        for term in terms[block]:
            moved = np.array([*term.bytes.row, 0.0]) * term.byte_s
            moved[-1 if term.gated else 0] += term.fixed_s
            busy = np.array([*term.flops.row, 0.0]) * term.flop_s
            if term.flop_s and not term.serial:
                upper.append(busy)
                lower.append(moved)
            else:
                plain += busy + moved
        upper.append(plain)
        lower.append(plain)
        ranges[block] = (first, len(upper))
    uppers, lowers = np.stack(upper), np.stack(lower)

    def evaluate(sizes: Sizes) -> Mapping[str, Floats]:
        shape = sizes.T.shape
        columns = [np.ones(shape), *(getattr(sizes, str(symbol)) for symbol in SYMBOLS)]
        columns.append(np.minimum(sizes.X, 1))
        table = np.stack(columns).reshape(len(columns), -1)
        seconds = np.maximum(uppers @ table, lowers @ table)
        return {b: seconds[i:j].sum(axis=0).reshape(shape) for b, (i, j) in ranges.items()}

    return evaluate


def compile_totals(formulas: StageFormulas) -> Callable[[Sizes], Mapping[str, Floats]]:
    """sizes → seconds by block, vectorised."""
    names = list(formulas)
    totals = [sympy.Add(*formulas[name].values()) for name in names]
    evaluate = _compile(totals)
    return lambda sizes: dict(zip(names, evaluate(sizes), strict=True))


def compile_parts(formulas: StageFormulas) -> Callable[[Sizes], Mapping[str, Mapping[str, Floats]]]:
    """sizes → seconds by block and part, vectorised."""
    keys = [(block, part) for block in formulas for part in formulas[block]]
    evaluate = _compile([formulas[block][part] for block, part in keys])

    def parts(sizes: Sizes) -> Mapping[str, Mapping[str, Floats]]:
        result: dict[str, dict[str, Floats]] = defaultdict(dict)
        for (block, part), seconds in zip(keys, evaluate(sizes), strict=True):
            result[block][part] = seconds
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


@dataclass(frozen=True)
class _Pricer:
    cluster: Cluster
    dtype: str
    mesh: Mapping[str, int]
    links: Mapping[str, str]

    def terms(self, tasks: Sequence[Task]) -> Iterator[Term]:
        yield self.fixed(sum(task.launches for task in tasks) * self.cluster["overhead.launch"])
        for task in tasks:
            yield self._local(task) if task.axis is None else self._remote(task, task.axis)

    def fixed(self, seconds: float) -> Term:
        none = _count(0)
        return Term("launch", none, 0.0, none, 0.0, seconds)

    def _local(self, task: Task) -> Term:
        compute, stream = {
            "memory": (None, "memory"),
            "matmul": ("matmul", "memory"),
            "attention_prefill": ("attention_prefill", "attention_decode"),
            "attention_decode": ("attention_prefill", "attention_decode"),
        }[task.resource]
        rate = self.cluster["memory.bandwidth"] * self.cluster[f"efficiency.{stream}"]
        flop_s = 0.0
        serial = self.cluster.target == "cpu"
        if compute is not None and not (serial and task.resource == "attention_decode"):
            peak = self.cluster[f"peak.{self.dtype}"]
            flop_s = 1 / (peak * self.cluster[f"efficiency.{compute}"])
        return Term(task.part, task.flops, flop_s, task.bytes, 1 / rate, serial=serial)

    def _remote(self, task: Task, axis: str) -> Term:
        link = self.links[axis]
        latency = self.cluster[f"links.{link}.latency"]
        byte_s = 1 / (self.cluster[f"links.{link}.bandwidth"] * self.cluster["efficiency.link"])
        if task.resource in ("all_reduce", "all_gather"):
            ranks = self.mesh[axis]
            rounds = 2 if task.resource == "all_reduce" else 1
            latency *= rounds * math.ceil(math.log2(ranks))
            byte_s *= rounds * (ranks - 1) / ranks
        gated = task.resource == "exchange"
        return Term(task.part, task.flops, 0.0, task.bytes, byte_s, latency, gated)
