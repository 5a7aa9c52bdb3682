"""Seconds of one micro-batch, from the IR's own counts and the cluster's figures.

For each block of a rank's program and each part that a prediction is broken into, one sympy
expression in the six sizes of `ir.sizes`:

    matmul, attention     Max(flops / (peak·e), bytes / (bandwidth·e_b))
    memory                bytes / (bandwidth·e)
    all_reduce            2·⌈log2 n⌉·α + 2·(n − 1)/n·bytes/β        up and down a tree; ring traffic
    all_gather            ⌈log2 n⌉·α + (n − 1)/n·bytes/β
    exchange              α (where there are peers) + bytes/β        pairwise, all at once
    launch                one kernel launch per op that computes

Blocks `embed`, `rotation`, `layer` and `head` are the functions of the module; `step` is what every
micro-batch costs a stage beside its ops (host time), `hop` sends [T, hidden] to the next stage: α + bytes/β.

α and β are those of the link that the axis crosses; e, e_b shares that are reached. The same expressions
are printed into the artifact's cost.py, and evaluated here through the very same text.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from sympy.printing.pycode import PythonCodePrinter

from ..artifact import Layout
from ..ir.graph import Function, Module
from ..ir.ops import Work, works
from ..ir.sizes import SYMBOLS, R, T, X
from .chunks import Floats, Sizes
from .cluster import Cluster

BLOCKS = ("step", "embed", "rotation", "layer", "head", "hop")
PARTS = ("linear", "attention", "communication", "launch", "other")

StageFormulas = Mapping[str, Mapping[str, sympy.Expr]]
"""block → part → seconds, in the symbols of `ir.sizes`."""


@dataclass(frozen=True)
class Links:
    """Which link each axis crosses: "intra" a node or "inter" nodes. tp never leaves its node."""

    kvp: str
    spp: str


@dataclass(frozen=True)
class Footprint:
    """Bytes per rank. Activations are an upper bound: everything that a layer makes, live at once."""

    embed: int
    layer: int
    head: int
    kv_per_token: int
    per_row: int
    per_logit_row: int
    per_peer_row: int

    def activations(self, sizes: Sizes) -> Floats:
        rows = sizes.T * self.per_row + sizes.R * self.per_logit_row
        return rows + sizes.X * self.per_peer_row


def links_of(layout: Layout, cluster: Cluster) -> Links:
    """Ranks lie tp innermost, then kvp, then spp: an axis stays inside a node while its span fits."""
    per_node, span = cluster.devices_per_node, layout.kvp * layout.tp
    fits = layout.gpus <= per_node
    kvp = "intra" if fits or layout.kvp == 1 or per_node % span == 0 else "inter"
    return Links(kvp, "intra" if fits or layout.spp == 1 else "inter")


def stage_formulas(module: Module, cluster: Cluster, dtype: str, links: Links) -> StageFormulas:
    """Seconds by block and part, for a sharded and fused module."""
    return {
        **core_formulas(module, cluster, dtype, links.kvp),
        "hop": hop_formula(module, cluster, links.spp),
    }


def core_formulas(module: Module, cluster: Cluster, dtype: str, kvp_link: str) -> StageFormulas:
    """All blocks but the hop: those do not depend on how stages are linked."""
    pricer = _Pricer(cluster, dtype, module.mesh, {"tp": "intra", "kvp": kvp_link})
    step = {"launch": sympy.Float(cluster["overhead.iteration"])}
    names = [name for name in BLOCKS if name not in ("step", "hop")]
    return {"step": _every_part(step)} | {n: pricer.function(module.functions[n]) for n in names}


def hop_formula(module: Module, cluster: Cluster, link: str) -> Mapping[str, sympy.Expr]:
    """Sending [T, hidden] to the next stage."""
    hidden = module.functions["embed"].result_types[0].local_bytes(module.mesh)
    latency = sympy.Float(cluster[f"links.{link}.latency"])
    return _every_part({"communication": latency + hidden * _per_byte(cluster, link)})


def _every_part(parts: Mapping[str, sympy.Expr]) -> Mapping[str, sympy.Expr]:
    return {part: parts.get(part, sympy.Integer(0)) for part in PARTS}


def footprint(module: Module) -> Footprint:
    """Bytes per rank: weights by block, KV per token and layer, activations per row."""
    functions, mesh = module.functions, module.mesh
    made = sum((_made_bytes(functions[name], mesh) for name in ("embed", "layer", "head")), T * 0)
    made += 2 * functions["embed"].result_types[0].local_bytes(mesh)
    layer = functions["layer"]
    payload = [w.bytes for op in layer.ops for w in works(op, layer, mesh) if w.resource == "exchange"]
    made = sympy.expand(made + 2 * sum(payload))
    (cache,) = (op.type for op in layer.ops if op.name == "cache")
    _, two, heads, dim = cache.local_shape(mesh)
    weights = {name: _weight_bytes(functions[name], mesh) for name in ("embed", "layer", "head")}
    kv_per_token = int(two) * int(heads) * int(dim) * cache.itemsize
    slopes = (int(made.coeff(size)) for size in (T, R, X))
    return Footprint(*weights.values(), kv_per_token, *slopes)


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

    def function(self, function: Function) -> Mapping[str, sympy.Expr]:
        terms: dict[str, list[sympy.Expr]] = {part: [] for part in PARTS}
        launches = 0
        for op in function.ops:
            done = works(op, function, self.mesh)
            launches += any(work.axis is None for work in done)
            for work in done:
                terms[work.part].append(self.seconds(work))
        terms["launch"].append(sympy.Float(launches * self.cluster["overhead.launch"]))
        return {part: sympy.Add(*terms[part]) for part in PARTS}

    def seconds(self, work: Work) -> sympy.Expr:
        if work.axis is not None:
            return self._collective(work, work.axis)
        if work.resource == "memory":
            return self._stream(work.bytes, "memory")
        compute, bandwidth = {
            "matmul": ("matmul", "memory"),
            "attention_prefill": ("attention_prefill", "attention_decode"),
            "attention_decode": ("attention_prefill", "attention_decode"),
        }[work.resource]
        peak = self.cluster[f"peak.{self.dtype}"] * self.cluster[f"efficiency.{compute}"]
        busy = work.flops * sympy.Float(1 / peak)
        return sympy.Max(busy, self._stream(work.bytes, bandwidth), evaluate=False)

    def _stream(self, size: Any, share: str) -> sympy.Expr:
        rate = self.cluster["memory.bandwidth"] * self.cluster[f"efficiency.{share}"]
        return size * sympy.Float(1 / rate)

    def _collective(self, work: Work, axis: str) -> sympy.Expr:
        link, ranks = self.links[axis], self.mesh[axis]
        latency = self.cluster[f"links.{link}.latency"]
        per_byte = _per_byte(self.cluster, link)
        if work.resource == "exchange":
            has_peers = sympy.Min(1, X, evaluate=False)
            return has_peers * sympy.Float(latency) + work.bytes * per_byte
        rounds = {"all_reduce": 2, "all_gather": 1}[work.resource]
        steps = rounds * math.ceil(math.log2(ranks))
        traffic = work.bytes * (per_byte * (rounds * (ranks - 1) / ranks))
        return sympy.Float(steps * latency) + traffic


def _per_byte(cluster: Cluster, link: str) -> sympy.Float:
    rate = cluster[f"links.{link}.bandwidth"] * cluster["efficiency.link"]
    return sympy.Float(1 / rate)


def _made_bytes(function: Function, mesh: Mapping[str, int]) -> sympy.Expr:
    values = (value for op in function.ops if works(op, function, mesh) for value in op.results)
    sizes = (v.type.local_bytes(mesh) for v in values if v.type.shape[0] in (T, R))
    return sum(sizes, T * 0)


def _weight_bytes(function: Function, mesh: Mapping[str, int]) -> int:
    return sum(int(op.type.local_bytes(mesh)) for op in function.ops if op.name == "param")
