"""Bytes that one rank holds: weights, KV cache and activations, from the types in the sharded module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from ..ir.graph import Function, Module
from ..ir.ops import works
from ..ir.sizes import R, T, X
from .chunks import Floats, Sizes


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


def footprint(module: Module) -> Footprint:
    """Bytes per rank: weights by block, KV per token and layer, activations per row."""
    functions, mesh = module.functions, module.mesh
    made = sum((_made_bytes(functions[name], mesh) for name in ("embed", "layer", "head")), T * 0)
    made += 2 * functions["embed"].result_types[0].local_bytes(mesh)
    layer = functions["layer"]
    payload = [
        w.bytes for op in layer.ops for w in works(op, layer, mesh) if w.resource == "exchange"
    ]
    made = sympy.expand(made + 2 * sum(payload))
    (cache,) = (op.type for op in layer.ops if op.name == "cache")
    _, two, heads, dim = cache.local_shape(mesh)
    return Footprint(
        embed=_weight_bytes(functions["embed"], mesh),
        layer=_weight_bytes(layer, mesh),
        head=_weight_bytes(functions["head"], mesh),
        kv_per_token=int(two) * int(heads) * int(dim) * cache.itemsize,
        per_row=int(made.coeff(T)),
        per_logit_row=int(made.coeff(R)),
        per_peer_row=int(made.coeff(X)),
    )


def _made_bytes(function: Function, mesh: Mapping[str, int]) -> sympy.Expr:
    values = (value for op in function.ops if works(op, function, mesh) for value in op.results)
    sizes = (v.type.local_bytes(mesh) for v in values if v.type.shape[0] in (T, R))
    return sum(sizes, T * 0)


def _weight_bytes(function: Function, mesh: Mapping[str, int]) -> int:
    return sum(int(op.type.local_bytes(mesh)) for op in function.ops if op.name == "param")
