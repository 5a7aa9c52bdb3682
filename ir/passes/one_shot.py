"""One shot: a sum over tp that only an add reads, with a norm behind it or without, becomes one op with it,
so that one kernel may read all ranks' rows where they lie. Valid IR in, valid IR out.

    partial = linear …                        partial = linear …
    sum = all_reduce partial              →   y, total = all_reduce_add_rms_norm partial, residual, weight
    y, total = add_rms_norm sum, residual, weight

What is read in place must not be written again too early. Partial sums go to two buffers in turn, and before
any is read all ranks meet: a rank that writes buffer 0 again has passed the meeting for buffer 1, and to that
every rank came only after it had read buffer 0. For this no two sums of one buffer may follow one another,
whatever functions are called in whatever order: so each has an even number of them, beginning with buffer 0.
An odd one out stays an all_reduce.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..graph import Function, Module, Op, Value
from ..ops import make
from ..ops.one_shot import SUMMED

AXIS = "tp"
"""The axis whose ranks can read one another's memory: it never leaves a node."""

PRODUCTS = ("linear", "linear_fp8")
"""Ops that can be told where to write."""


def one_shot(module: Module) -> Module:
    """Every function of the module with its sums over tp in the ops that read them."""
    functions = {name: _summed(function, module) for name, function in module.functions.items()}
    return dataclasses.replace(module, functions=functions)


def _summed(function: Function, module: Module) -> Function:
    pairs = list(_pairs(function))
    pairs = pairs[: len(pairs) // 2 * 2]
    sums = {id(reduce) for reduce, _ in pairs}
    turns = {id(reader): (turn % 2, reduce) for turn, (reduce, reader) in enumerate(pairs)}
    ops = []
    for op in function.ops:
        if id(op) in turns:
            turn, reduce = turns[id(op)]
            ops.append(_joined(reduce, op, turn, function, module))
        elif id(op) not in sums:
            ops.append(op)
    return dataclasses.replace(function, ops=tuple(ops))


def _pairs(function: Function) -> Iterator[tuple[Op, Op]]:
    """Sums over the axis, each with the op that alone reads it; none is written before the last is read."""
    places = {value.name: place for place, op in enumerate(function.ops) for value in op.results}
    last = -1
    for reduce in function.ops:
        if reduce.name != "all_reduce" or reduce.attrs["axis"] != AXIS:
            continue
        made, name = places[reduce.operands[0]], reduce.results[0].name
        readers = [place for place, op in enumerate(function.ops) if name in op.operands]
        if function.ops[made].name not in PRODUCTS or made < last or name in function.returns:
            continue
        if len(readers) == 1 and _takes(reader := function.ops[readers[0]], name, function):
            last = readers[0]
            yield reduce, reader


def _takes(reader: Op, name: str, function: Function) -> bool:
    """Whether an op can complete the sum. An add's result is written over what the sum is added to."""
    if reader.name not in SUMMED or reader.operands.index(name) != SUMMED[reader.name]:
        return False
    return reader.name != "add" or function.is_spent(reader.operands[0], reader)


def _joined(reduce: Op, reader: Op, turn: int, function: Function, module: Module) -> Op:
    operands = list(reader.operands)
    operands[SUMMED[reader.name]] = reduce.operands[0]
    return make(
        f"all_reduce_{reader.name}",
        [Value(name, function.types[name]) for name in operands],
        [value.name for value in reader.results],
        {"axis": AXIS, "turn": turn, **reader.attrs},
        module.mesh,
    )
