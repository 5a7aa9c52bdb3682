"""Seconds of one micro-batch, from the IR's own counts and the cluster's figures.

For each block of a rank's program and each part that a prediction is broken into, one sympy
expression in the six sizes of `ir.sizes`. With e and h a curve's full share and half size, and g an op's
grain (see `curves` and `ir.ops.Work`):

    matmul, prefill       Max((flops + h·g)/(peak·e), bytes/(bandwidth·e_b))    whichever bounds
    decode                Max(flops/(peak·e), (bytes + h·g)/(bandwidth·e_b))
    memory                (bytes + h·g)/(bandwidth·e)
    all_reduce            2·⌈log2 n⌉·α + 2·(n − 1)/n·bytes/β        up and down a tree; ring traffic
    one_shot              Min(all_reduce, 2·α + (n − 1)·bytes/β)     all meet, then read all rows
                          (by the kernel that reads the sum next; see `passes.one_shot`)
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

Blocks `embed`, `layer` and `head` are the functions of the module; `entry` is what every stage begins with
(`counting`), `step` what every micro-batch costs it beside its ops (host time), `hop` sends [T, hidden] to
the next stage: α + bytes/β.
In the head is, too, what each sequence that gets a token costs beside all ops (`overhead.row`): to sample and
hand it out, and what kernels take longer over several sequences than over one as long as all of them.

A layer in two halves (`halves`; see `passes.overlap`) has each half's exchange run beside other ops
(`counting`). With S the seconds of those and n = `LENT`, of whose multiprocessors one is left to messages,
they and the exchange take together

    Max(S·n/(n − 1), α + bytes/β)                of which all but S counts as communication

A micro-batch goes in halves if T − R ≥ the least rows that are worth it and neither QK nor X is 0: as far
as six sizes can tell, it has a chunk that large, on several groups. On a CPU, whose cores carry the
messages themselves, nothing runs beside them.

A term is a row of coefficients or the larger of two. What the artifact prints and what the search looks up is
made of terms in `formulas`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from ..ir.sizes import R
from ..layout import Layout
from .cluster import Cluster
from .counting import BASIS, Row, Task, row_of, sum_rows

PARTS = ("linear", "attention", "communication", "launch", "other")


@dataclass(frozen=True)
class Links:
    """Which link each axis crosses: "intra" a node or "inter" nodes. tp never leaves its node."""

    kvp: str
    spp: str


@dataclass(frozen=True)
class Term:
    """Seconds of one work: the larger of two affine functions, or one alone. beside, transfers: see Task.

    lesser: the smaller of two
    """

    part: str
    rows: tuple[Row, ...]
    beside: int = 0
    transfers: bool = False
    lesser: bool = False

    def seconds(self) -> sympy.Expr:
        sides = [_expression(row) for row in self.rows]
        if len(sides) == 1:
            return sides[0]
        return (sympy.Min if self.lesser else sympy.Max)(*sides, evaluate=False)


@dataclass(frozen=True)
class Block:
    """What a block does on the device, and what its launches take the host."""

    terms: tuple[Term, ...]
    host_s: float = 0.0

    @property
    def computing(self) -> tuple[Term, ...]:
        """What takes the device's own time."""
        return tuple(term for term in self.terms if not term.transfers)

    @property
    def transfers(self) -> tuple[tuple[Term, tuple[Term, ...]], ...]:
        """Those that others run beside, with these."""
        return tuple(
            (transfer, tuple(t for t in self.computing if t.beside == transfer.beside))
            for transfer in self.terms
            if transfer.transfers
        )


Terms = Mapping[str, Block]
"""block name → block."""


def links_of(layout: Layout, cluster: Cluster) -> Links:
    """Ranks lie tp innermost, then kvp, then spp: an axis stays inside a node while its span fits."""
    per_node, span = cluster.devices_per_node, layout.kvp * layout.tp
    fits = layout.gpus <= per_node
    kvp = "intra" if fits or layout.kvp == 1 or per_node % span == 0 else "inter"
    return Links(kvp, "intra" if fits or layout.spp == 1 else "inter")


def _expression(row: Row) -> sympy.Expr:
    pairs = zip(row, BASIS, strict=True)
    return sympy.Add(*(sympy.Float(value) * base for value, base in pairs if value))


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
        head, row = blocks["head"], _launch((cluster["overhead.row"], row_of(R)))
        blocks["head"] = replace(head, terms=(*head.terms, row))
    step = _launch((cluster["overhead.iteration"], row_of(1)))
    return {"step": Block((step,)), **blocks}


def _launch(*seconds: tuple[float, Row], beside: int = 0) -> Term:
    return Term("launch", (sum_rows(*seconds),), beside)


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
        if self.cluster.target == "cpu":
            tasks = [replace(task, beside=0, transfers=False) for task in tasks]
        launches = Counter[int]()
        for task in tasks:
            launches[task.beside] += task.launches
        launch_s, host_s = self.cluster["overhead.launch"], 0.0
        if "overhead.launch_captured" in self.cluster.numbers:
            host_s = launches.total() * launch_s if self.eager else 0.0
            launch_s = self.cluster["overhead.launch_captured"]
        between = (
            _launch((count * launch_s, row_of(1)), beside=beside)
            for beside, count in launches.items()
        )
        priced = (
            replace(
                self._local(task) if task.axis is None else self._remote(task, task.axis),
                beside=task.beside,
                transfers=task.transfers,
            )
            for task in tasks
        )
        return Block((*between, *priced), host_s)

    def _local(self, task: Task) -> Term:
        compute, stream = _CURVES[task.resource]
        curve = self.cluster.curve(stream)
        byte_s = 1 / (self.cluster["memory.bandwidth"] * curve.full)
        half_s = byte_s * curve.half if task.resource == stream else 0.0
        streaming = sum_rows((max(byte_s, self._shared_byte_s()), task.bytes), (half_s, task.grain))
        if compute is None:
            return Term(task.part, (streaming,))
        curve = self.cluster.curve(compute)
        peak = self.cluster[_PEAKS.get(compute, f"peak.{self.dtype}")]
        flop_s = 1 / (peak * curve.full)
        half = curve.half if task.resource == compute else 0.0
        return Term(
            task.part, (sum_rows((flop_s, task.flops), (flop_s * half, task.grain)), streaming)
        )

    def _shared_byte_s(self) -> float:
        """Seconds per byte of a rank's share of its node's memory; 0 where it has its own."""
        if "memory.shared_bandwidth" not in self.cluster.numbers:
            return 0.0
        at_once = min(self.mesh["tp"] * self.mesh["kvp"], self.cluster.devices_per_node)
        return at_once / self.cluster["memory.shared_bandwidth"]

    def _remote(self, task: Task, axis: str) -> Term:
        if task.resource == "one_shot":
            return self._one_shot(task, axis)
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
        return Term(task.part, (sum_rows((latency_s, task.grain), (byte_s, task.bytes)),))

    def _one_shot(self, task: Task, axis: str) -> Term:
        (summed,) = self._remote(replace(task, resource="all_reduce"), axis).rows
        alpha, beta = self._link(axis)
        read = sum_rows((2 * alpha, task.grain), ((self.mesh[axis] - 1) * beta, task.bytes))
        return Term(task.part, (summed, read), lesser=True)

    def _link(self, axis: str) -> tuple[float, float]:
        return _link(self.cluster, self.links[axis])


def _link(cluster: Cluster, link: str) -> tuple[float, float]:
    """Seconds of latency, and per byte, of a link."""
    rate = cluster[f"links.{link}.bandwidth"] * cluster["efficiency.link"]
    return cluster[f"links.{link}.latency"], 1 / rate


def one_shot_rows(cluster: Cluster, tp: int, row_bytes: int) -> int:
    """The most rows of which a sum over so many ranks is quicker read than made by all_reduce; 0: none.

    Where not all of them are behind one switch, each would have to reach the others over parts of its links.
    """
    if tp < 2 or cluster.target == "cpu" or tp > cluster.switched:
        return 0
    alpha, beta = _link(cluster, "intra")
    saved_s = 2 * (math.ceil(math.log2(tp)) - 1) * alpha
    longer_s = ((tp - 1) - 2 * (tp - 1) / tp) * beta * row_bytes
    return math.ceil(saved_s / longer_s) - 1 if longer_s > 0 else 0
