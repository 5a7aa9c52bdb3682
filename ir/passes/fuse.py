"""Fuse: neighbouring ops that one kernel serves become one op. Valid IR in, valid IR out.

    q, k, v = linear(x, ·) … norm, rope, append    → linear(x, [w_q; w_k; w_v]), rope_append
    silu_mul(linear(x, ·), linear(x, ·))           → swiglu(linear(x, [w_gate; w_up]))
    add, then rms_norm of the sum                  → add_rms_norm

Joined weights keep a list of sources; each rank's piece is the concatenation of its piece of each.
"""

from __future__ import annotations

import dataclasses
import itertools

from ..graph import Attr, Function, Module, Op, Value, sources_and_copies
from ..ops import make


def fuse(module: Module) -> Module:
    """Every function of the module fused."""
    functions = {
        name: _fuse_norms(_fuse_gates(_fuse_qkv(function, module), module), module)
        for name, function in module.functions.items()
    }
    return dataclasses.replace(module, functions=functions)


def _fuse_qkv(function: Function, module: Module) -> Function:
    producer = _producers(function)
    append = next((op for op in function.ops if op.name == "append"), None)
    attend = next((op for op in function.ops if op.name == "attend"), None)
    if append is None or attend is None:
        return function
    chains = [_chain(producer, name) for name in (attend.operands[0], *append.operands[1:])]
    linears = [chain["linear"] for chain in chains]
    if len({op.operands[0] for op in linears}) != 1:
        return function
    new: list[Op] = []
    packed = _joined_linear(producer, linears, "qkv", module, new)
    norms = [producer[chain["rms_norm"].operands[1]] for chain in chains if "rms_norm" in chain]
    new += norms
    cache, rot = producer[append.operands[0]], chains[0]["rope"].operands[1]
    new.append(cache)
    eps = chains[0]["rms_norm"].attrs["eps"] if norms else 0.0
    operands = [packed, Value(rot, function.types[rot]), cache.results[0]]
    operands += [op.results[0] for op in norms]
    names = (attend.operands[0], append.results[0].name)
    heads = chains[0]["split_heads"].attrs["heads"]
    new.append(make("rope_append", operands, names, {"heads": heads, "eps": eps}, module.mesh))
    gone = [op for chain in chains for op in chain.values()] + norms + [cache, append]
    gone += [producer[name] for op in linears for name in op.operands[1:]]
    return _replace(function, gone, new, before=attend)


def _chain(producer: dict[str, Op], name: str) -> dict[str, Op]:
    """The ops from a projection to the heads that attention reads, by name."""
    chain: dict[str, Op] = {}
    while True:
        op = producer[name]
        chain[op.name] = op
        if op.name == "linear":
            return chain
        name = op.operands[0]


def _fuse_gates(function: Function, module: Module) -> Function:
    producer = _producers(function)
    for op in function.ops:
        if op.name != "silu_mul":
            continue
        linears = [producer[name] for name in op.operands]
        if any(linear.name != "linear" for linear in linears):
            continue
        new: list[Op] = []
        packed = _joined_linear(producer, linears, "gate_up", module, new)
        new.append(make("swiglu", [packed], [op.results[0].name], {}, module.mesh))
        weights = [producer[name] for linear in linears for name in linear.operands[1:]]
        function = _replace(function, [*linears, *weights, op], new, before=op)
    return function


def _fuse_norms(function: Function, module: Module) -> Function:
    producer = _producers(function)
    for op in function.ops:
        if op.name != "rms_norm" or op.operands[0] not in producer:
            continue
        add = producer[op.operands[0]]
        if add.name != "add":
            continue
        residual, delta = (Value(name, function.types[name]) for name in add.operands)
        weight = producer[op.operands[1]]
        names = (op.results[0].name, add.results[0].name)
        fused = make(
            "add_rms_norm", [delta, residual, weight.results[0]], names, op.attrs, module.mesh
        )
        function = _replace(function, [add, weight, op], [weight, fused], before=op)
    return function


def _joined_linear(
    producer: dict[str, Op], linears: list[Op], name: str, module: Module, new: list[Op]
) -> Value:
    """One linear in place of several of the same x; its weights (and biases) joined along dim 0."""
    joined = []
    for position, prefix in list(enumerate(("", "w", "b")))[1 : len(linears[0].operands)]:
        params = [producer[linear.operands[position]] for linear in linears]
        sources, copies = (
            tuple(itertools.chain.from_iterable(column))
            for column in zip(*map(sources_and_copies, params), strict=True)
        )
        first = params[0].type
        rows = sum(size for op in params if isinstance(size := op.type.shape[0], int))
        type = dataclasses.replace(first, shape=(rows, *first.shape[1:]))
        attrs: dict[str, Attr] = {"sources": sources}
        if any(count > 1 for count in copies):
            attrs["copies"] = copies
        param = Op("param", (), attrs, (Value(f"{prefix}_{name}", type),))
        new.append(param)
        joined.append(param.results[0])
    x = linears[0].operands[0]
    owner = next(op for op in producer.values() if any(v.name == x for v in op.results))
    operand = next(value for value in owner.results if value.name == x)
    new.append(make("linear", [operand, *joined], [name], {}, module.mesh))
    return new[-1].results[0]


def _producers(function: Function) -> dict[str, Op]:
    return {value.name: op for op in function.ops for value in op.results}


def _replace(function: Function, gone: list[Op], new: list[Op], before: Op) -> Function:
    """The function with `new` standing where `before` stood, and `gone` left out."""
    ops: list[Op] = []
    for op in function.ops:
        if op is before:
            ops += new
        if not any(op is other for other in gone):
            ops.append(op)
    return dataclasses.replace(function, ops=tuple(ops))
