"""What each op of the lowered IR becomes as lines of Python: one row of EMIT an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir.graph import Function, Op, layers_ahead
from ..ir.ops.one_shot import SUMMED
from ..ir.types import TORCH_NAMES

ONE_SHOT = {f"all_reduce_{name}" for name in SUMMED}


@dataclass(frozen=True)
class Emitting:
    """The function being emitted: which names are weights, and of which layer."""

    function: Function
    mesh: Mapping[str, int]

    def ref(self, name: str) -> str:
        """How the emitted code says a value: weights live in `w`, the next layer's in `next_w`."""
        weights = {op.results[0].name: op for op in self.function.ops if op.name == "param"}
        if name not in weights:
            return name
        return f"next_w.{name}" if layers_ahead(weights[name]) else f"w.{name}"

    def half(self, name: str) -> object:
        """Of attention, which half a result of it is."""
        made = (op for op in self.function.ops if any(value.name == name for value in op.results))
        return next(made).attrs.get("half")

    def is_sent(self, name: str) -> bool:
        """Whether a partial result is on its way already."""
        partial = self.function.types[name].partial
        return partial is not None and partial.kind == "sent"

    def turn(self, name: str) -> object:
        """Of a partial sum that the ranks read in place, which buffer it goes to; None of any other value."""
        readers = (op for op in self.function.ops if op.name in ONE_SHOT and name in op.operands)
        return next((op.attrs["turn"] for op in readers if op.operands[_summand(op)] == name), None)

    def is_read(self, name: str) -> bool:
        return any(name in op.operands for op in self.function.ops) or name in self.function.returns


def _call(template: str) -> Callable[[Op, Emitting], list[str]]:
    """`result = template`, with the operands filled in by position."""

    def emit(op: Op, f: Emitting) -> list[str]:
        operands = [f.ref(name) for name in op.operands]
        results = ", ".join(value.name for value in op.results)
        text = template.format(*operands, all=", ".join(operands), **op.attrs)
        return [f"{results} = {text}"]

    return emit


def _embed(op: Op, f: Emitting) -> list[str]:
    ids, table = (f.ref(name) for name in op.operands)
    if op.type.partial is None:
        return [f"{op.results[0].name} = F.embedding({ids}, {table})"]
    return [
        f"row = {ids} - comm.tp_rank * {table}.shape[0]",
        f"mine = (row >= 0) & (row < {table}.shape[0])  # tokens of this rank's part",
        f"{op.results[0].name} = F.embedding(torch.where(mine, row, 0), {table}) * mine.unsqueeze(1)",
    ]


def _summand(op: Op) -> int:
    """Which operand of an op that sums over ranks is the partial sum."""
    return SUMMED[op.name.removeprefix("all_reduce_")]


def _linear(op: Op, f: Emitting) -> list[str]:
    result = op.results[0].name
    if (turn := f.turn(result)) is not None:
        x, weight = (f.ref(name) for name in op.operands)
        room = f"collectives.room({x}, {turn}, comm)"
        return [f"{result} = torch.mm({x}, {weight}.t(), out={room})"]
    library = "F." if op.attrs["kernel"] == "torch" else ""
    operands = ", ".join(f.ref(name) for name in op.operands)
    return [f"{result} = {library}linear({operands})"]


def _linear_fp8(op: Op, f: Emitting) -> list[str]:
    """The vendor's product, of rows and channels with scales of their own.

    The weight's transpose is the column-major operand that it wants, and its scales' a row. Sums are kept in
    the matrix unit ("fast"), as is usual for inference: what that loses is less than bfloat16's own rounding.
    """
    x, x_scale, weight, w_scale, *bias = (f.ref(name) for name in op.operands)
    operands = ", ".join((x, f"{weight}.t()", x_scale, f"{w_scale}.t()", *bias))
    dtype, result = TORCH_NAMES[str(op.attrs["dtype"])], op.results[0].name
    turn = f.turn(result)
    room = "" if turn is None else f" out=collectives.room({x}, {turn}, comm),"
    return [
        f"{result} = torch._scaled_mm(",
        f"    {operands},",
        f"    out_dtype=torch.{dtype}, use_fast_accum=True,{room}",
        ")",
    ]


def _add(op: Op, f: Emitting) -> list[str]:
    a, b = op.operands
    in_place = "_" if f.function.is_spent(a, op) else ""
    return [f"{op.results[0].name} = {f.ref(a)}.add{in_place}({f.ref(b)})"]


def _rope_append(op: Op, f: Emitting) -> list[str]:
    qkv, rot, _, *norms = op.operands
    more = "".join(f", {f.ref(name)}" for name in norms)
    return [
        f"{op.results[0].name} = rope_append({qkv}, {rot}, k_cache, v_cache, batch.slots{more})"
    ]


def _halve(op: Op, f: Emitting) -> list[str]:
    results = ", ".join(value.name for value in op.results)
    return [f"{results} = {op.operands[0]}.split(batch.halves)"]


def _attend(op: Op, f: Emitting) -> list[str]:
    q, (out, lse) = op.operands[0], (value.name for value in op.results)
    arguments = "k_cache, v_cache"
    if op.attrs.get("half") == 1:
        call, given = "attention_prefill.attention_prefill", f"{arguments}, second_prefill"
        return [
            f"{out} = torch.empty_like({q})",
            f"{lse} = torch.empty({q}.shape[:2], dtype=torch.float32, device={q}.device)",
            f"{call}({q}, {given}, {out}, {lse})",
        ]
    return [
        f"{out}, n = torch.empty_like({q}), batch.num_decode",
        f"{lse} = torch.empty({q}.shape[:2], dtype=torch.float32, device={q}.device)",
        "if batch.decode is not None:",
        f"    attention_decode.attention_decode({q}[:n], {arguments}, decode, {out}[:n], {lse}[:n])",
        "if batch.prefill is not None:",
        f"    attention_prefill.attention_prefill({q}[n:], {arguments}, prefill, {out}[n:], {lse}[n:])",
    ]


def _exchange(op: Op, f: Emitting) -> list[str]:
    """What is under way is one object, and has the first result's name."""
    (out, lse), sent = op.operands, op.results[0].name
    swaps = "second_swaps" if f.half(out) == 1 else "swaps"
    return [f"{sent} = collectives.{op.name}_over_kvp({out}, {lse}, {swaps}, comm.kvp)"]


def _merge_sent(op: Op, f: Emitting) -> list[str]:
    out, lse = (value.name for value in op.results)
    read = [name if f.is_read(name) else "_" for name in (out, lse)]
    return [f"{', '.join(read)} = collectives.merge_sent({op.operands[0]})"]


def _merge(op: Op, f: Emitting) -> list[str]:
    if f.is_sent(op.operands[0]):
        return _merge_sent(op, f)
    (out, lse), (merged_out, merged_lse) = op.operands, (value.name for value in op.results)
    read = ", ".join(name if f.is_read(name) else "_" for name in (merged_out, merged_lse))
    return [f"{read} = collectives.merge_over_kvp({out}, {lse}, swaps, comm.kvp)"]


def _merge_scatter(op: Op, f: Emitting) -> list[str]:
    if f.is_sent(op.operands[0]):
        return _merge_sent(op, f)
    (out, lse), results = op.operands, ", ".join(value.name for value in op.results)
    return [f"{results} = collectives.merge_scatter_over_kvp({out}, {lse}, swaps, comm.kvp)"]


def _all_reduce(op: Op, f: Emitting) -> list[str]:
    (x,) = op.operands
    return [f"dist.all_reduce({x}, group=comm.{op.attrs['axis']})", f"{op.results[0].name} = {x}"]


def _sum(op: Op, f: Emitting) -> list[str]:
    """A sum that is completed by the op that reads it: from the peers' memory, or by NCCL first."""
    given = ", ".join([*map(f.ref, op.operands), str(op.attrs["turn"]), "comm"])
    results = ", ".join(value.name for value in op.results)
    return [f"{results} = collectives.{op.name}({given})"]


EMIT: Mapping[str, Callable[[Op, Emitting], list[str]]] = {
    "embed": _embed,
    "rotary": _call("rotary({0})"),
    "rms_norm": _call("rms_norm({all})"),
    "add_rms_norm": _call("add_rms_norm({all})"),
    "linear": _linear,
    "rms_norm_fp8": _call("rms_norm_fp8({all})"),
    "add_rms_norm_fp8": _call("add_rms_norm_fp8({all})"),
    "swiglu_fp8": _call("swiglu_fp8({0})"),
    "quantize_fp8": _call("quantize_fp8({0})"),
    "linear_fp8": _linear_fp8,
    "add": _add,
    "swiglu": _call("swiglu({0})"),
    "merge_heads": _call("{0}.flatten(1)"),
    "select": _call("{0}.index_select(0, {1})"),
    "cast": _call("{0}.float()"),
    "rope_append": _rope_append,
    "attend": _attend,
    "halve": _halve,
    "join": _call("torch.cat(({all}))"),
    "exchange": _exchange,
    "exchange_scatter": _exchange,
    "merge": _merge,
    "merge_scatter": _merge_scatter,
    "all_reduce": _all_reduce,
    **dict.fromkeys(ONE_SHOT, _sum),
    "all_gather": _call("collectives.all_gather({0}, {dim}, comm.{axis})"),
}
