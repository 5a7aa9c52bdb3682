"""Split into stages: one program in, one program per pipeline stage out.

Stage s holds the calls of its slice of the layers; the first also embeds, the last also has the head,
and calls that only prepare what every layer reads (`rotation`) are repeated in each stage. What a stage
returns arrives as a parameter of the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..graph import Call, Module, Program, Value
from ..types import TensorType


def split_stages(module: Module, layer_counts: Sequence[int], names: Sequence[str]) -> Module:
    """`layer_counts[s]` layers in the stage called `names[s]`."""
    whole = module.program
    types = _types(module, whole)
    assert sum(layer_counts) == sum(call.count for call in whole.calls if call.layers)
    programs: list[Program] = []
    first = 0
    for index, count in enumerate(layer_counts):
        is_first, is_last = index == 0, index == len(layer_counts) - 1
        calls = _slice(whole, first, first + count, is_first, is_last)
        defined = {name for call in calls for name in call.results}
        used = [name for call in calls for name in call.operands]
        arriving = sorted(set(used) - defined, key=used.index)
        params = tuple(Value(name, types[name]) for name in arriving)
        carried = next(call.results for call in reversed(calls) if call.layers)
        returns = whole.returns if is_last else carried
        programs.append(Program(names[index], params, calls, returns))
        first += count
    return dataclasses.replace(module, programs=tuple(programs))


def _slice(whole: Program, first: int, end: int, is_first: bool, is_last: bool) -> tuple[Call, ...]:
    """The calls of one stage; the first layer call of a later stage reads what arrived."""
    batch_inputs = {value.name for value in whole.params}
    read_by_layers = {name for call in whole.calls if call.layers for name in call.operands[1:]}
    calls: list[Call] = []
    entered, passed_layers = is_first, False
    for call in whole.calls:
        if call.layers is None:
            prepares = set(call.operands) <= batch_inputs and set(call.results) <= read_by_layers
            if prepares or (is_last if passed_layers else is_first):
                calls.append(call)
            continue
        passed_layers = True
        low, high = max(first, call.layers[0]), min(end, call.layers[1])
        if low < high:
            arriving = call.operands[0] if entered else f"{call.results[0]}_in"
            operands = (arriving, *call.operands[1:])
            calls.append(dataclasses.replace(call, operands=operands, layers=(low, high)))
            entered = True
    return tuple(calls)


def _types(module: Module, program: Program) -> dict[str, TensorType]:
    types = {value.name: value.type for value in program.params}
    for call in program.calls:
        results = module.functions[call.function].result_types
        types.update(zip(call.results, results, strict=True))
        if call.layers:
            types[f"{call.results[0]}_in"] = results[0]
    return types
