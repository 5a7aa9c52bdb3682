"""Emits the `step` of a stage: its program's calls, one after the other, each under its IR."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..artifact import Stage
from ..ir.graph import Call, Function, Module, Program
from ..ir.text import print_call

BATCH_INPUTS = ("ids", "pos", "last")
MERGES = {"merge", "merge_scatter"}
_WIDTH = 96
"""Of a line in a function's body."""


@dataclass(frozen=True)
class Stepping:
    """A stage to emit the step of; arguments: what an emitted function takes."""

    module: Module
    program: Program
    stage: Stage
    target: str
    arguments: Callable[[Function], list[str]]

    def function(self, name: str) -> Function:
        return self.module.functions[name]

    def given(self, name: str, rows: list[str]) -> list[str]:
        """What a function is called with, its rows last."""
        return [*self.arguments(self.function(name))[: -len(rows)], *rows]

    def spent(self, names: tuple[str, ...], call: Call) -> list[str]:
        """Those that only this call reads, while others are still to come."""
        later = self.program.calls[self.program.calls.index(call) + 1 :]
        read = {*self.program.returns, *(name for other in later for name in other.operands)}
        return [name for name in names if name not in {*read, *BATCH_INPUTS}] if later else []

    def part(self, what: str, first: int, end: int) -> str:
        """`what` of the model's layers `first` to `end`, of which the stage has its own."""
        a, b = first - self.stage.first_layer, end - self.stage.first_layer
        if b - a == self.stage.num_layers:
            return what
        return f"{what}[{a or ''}:{b if b < self.stage.num_layers else ''}]"


def step_lines(stepping: Stepping) -> list[str]:
    """The body of `step`."""
    lines = [
        "decode = batch.decode and attention_decode.prepare(batch.decode)",
        "prefill = batch.prefill and attention_prefill.prepare(batch.prefill)",
    ]
    calls = stepping.program.calls
    called = [stepping.function(call.function) for call in calls]
    halved = any(call.halved for call in calls)
    if any(op.name in MERGES for function in called for op in function.ops):
        rows = "batch.halves[0]" if halved else "batch.pos.shape[0]"
        lines.append(f"swaps = collectives.prepare(batch.exchange, {rows}, comm.kvp)")
    if halved:
        beside = "_beside" if stepping.target != "cpu" else ""  # a CPU has no device to share
        lines += [
            "if batch.second is not None:",
            f"    second_prefill = attention_prefill.prepare{beside}(batch.second.prefill)",
            "    exchange, rows = batch.second.exchange, batch.halves[1]",
            "    second_swaps = collectives.prepare(exchange, rows, comm.kvp)",
        ]
    for call in calls:
        emit = _once if call.layers is None else _one if call.count == 1 else _repeated
        lines += [f"# {print_call(call)}", *emit(call, stepping)]
    (result,) = stepping.program.returns
    return [*lines, f"return {result}"]


def _once(call: Call, stepping: Stepping) -> Iterator[str]:
    """A call that is of no layer."""
    if "last" in call.operands:
        yield from ("if batch.last.shape[0] == 0:", "    return None  # no row wants logits")
    yield _assigned(call, call.function, stepping.given(call.function, _values(call)))


def _one(call: Call, stepping: Stepping) -> Iterator[str]:
    """A call of one layer."""
    assert call.layers is not None
    at = call.layers[0] - stepping.stage.first_layer
    says = {"w": f"w.layers[{at}]", "next_w": f"w.layers[{at + 1}]", "k_cache": f"*kv[{at}]"}

    def called(name: str) -> str:
        given = stepping.given(name, _values(call))
        return _assigned(call, name, [says.get(g, g) for g in given if g != "v_cache"])

    yield from _chosen(call, called)
    if spent := stepping.spent(call.operands, call):
        yield f"del {', '.join(spent)}"


def _repeated(call: Call, stepping: Stepping) -> Iterator[str]:
    """A call of each of several layers. What it starts from is let go: the next layer's is in its place."""
    assert call.layers is not None
    (first, end), values = call.layers, _values(call)
    count = len(call.results)
    rows = [*call.results, *values[count:]]

    def called(name: str) -> str:
        given = stepping.given(name, rows)
        return _assigned(call, name, ["layer_w" if g == "w" else g for g in given])

    yield f"{', '.join(call.results)} = {', '.join(values[:count])}"
    if spent := stepping.spent(call.operands[:count], call):
        yield f"del {', '.join(spent)}"
    names, parts = ["layer_w"], [stepping.part("w.layers", first, end)]
    if "next_w" in stepping.arguments(stepping.function(call.function)):
        names.append("next_w")
        parts.append(stepping.part("w.layers", first + 1, end + 1))
    parts.append(stepping.part("kv", first, end))
    yield f"for {', '.join(names)}, (k_cache, v_cache) in zip({', '.join(parts)}, strict=True):"
    yield from (f"    {line}" for line in _chosen(call, called))


def _values(call: Call) -> list[str]:
    return [f"batch.{name}" if name in BATCH_INPUTS else name for name in call.operands]


def _assigned(call: Call, name: str, given: list[str]) -> str:
    return f"{', '.join(call.results)} = {name}({', '.join(given)})"


def _chosen(call: Call, called: Callable[[str], str]) -> Iterator[str]:
    """The call, or where it has another for halves that which the batch takes."""
    if call.halved is None:
        yield from _fitted(called(call.function))
        return
    yield "if batch.second is None:"
    yield from (f"    {line}" for line in _fitted(called(call.function)))
    yield "else:"
    yield from (f"    {line}" for line in _fitted(called(call.halved)))


def _fitted(call: str) -> list[str]:
    """A call on one line, or on three."""
    if len(call) <= _WIDTH - 2 * len("    "):
        return [call]
    head, _, given = call.partition("(")
    return [f"{head}(", f"    {given[:-1]}", ")"]
