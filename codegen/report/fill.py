"""Figures against their limits: the promise, and the memory of each stage's ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...artifact import Plan, Prediction, Workload
from ...ir.graph import Module
from ...units import format_bytes, format_duration
from ...wording import growth_words, room_words

_LABELS = {
    "kv": "KV cache",
    "activation": "activations",
    "room": "room for more",
    "bubble": "pipeline fill",
}


@dataclass(frozen=True)
class Part:
    """A part of a whole: its name (and colour), its label, its amount, its percent of a limit."""

    name: str
    label: str
    value: str
    share: float


@dataclass(frozen=True)
class Gauge:
    """A figure against its limit, by part. share: percent of the limit."""

    name: str
    what: str
    value: str
    limit: str
    share: float
    kept: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Promise:
    kept: bool
    gauges: tuple[Gauge, ...]
    remarks: tuple[str, ...]


def promise(workload: Workload, plan: Plan) -> Promise:
    """Each promised figure as predicted, against its limit and by part."""
    said, held = plan.predicted, plan.memory
    gauges = (
        _time("TTFT", "time to first token", said.ttft_s, workload.ttft_s, said.ttft_parts_s),
        _time("TBT", "time between tokens", said.tbt_s, workload.tbt_s, said.tbt_parts_s),
        _gauge(
            "Memory",
            "of the fullest rank",
            (held.promised_bytes, held.capacity_bytes),
            format_bytes,
            held.parts,
        ),
    )
    remarks = (
        f"{said.throughput_tokens_per_s:,.0f} tokens per second in steady decode, "
        f"{_prefill_rate(workload, said):,.0f} in prefill.",
        *([f"All that memory has room for: {room_words(plan)}."] if held.room_bytes else []),
    )
    return Promise(all(gauge.kept for gauge in gauges), gauges, remarks)


def _prefill_rate(workload: Workload, said: Prediction) -> float:
    return workload.context / said.ttft_s


def _time(name: str, what: str, value: float, limit: float, parts: Mapping[str, float]) -> Gauge:
    return _gauge(name, what, (value, limit), format_duration, parts)


def _gauge(
    name: str,
    what: str,
    figures: tuple[float, float],
    formatted: Callable[[float], str],
    parts: Mapping[str, float],
) -> Gauge:
    value, limit = figures
    return Gauge(
        name=name,
        what=what,
        value=formatted(value),
        limit=formatted(limit),
        share=_percent(value, limit),
        kept=value <= limit * (1 + 1e-9),
        parts=tuple(
            _part(part, formatted(amount), _percent(amount, limit))
            for part, amount in parts.items()
            if amount > 0.0005 * value
        ),
    )


def _part(name: str, value: str, share: float) -> Part:
    return Part(name, _LABELS.get(name, name), value, share)


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2)


@dataclass(frozen=True)
class Bar:
    """What a rank of a stage holds."""

    name: str
    layers: str
    total: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Filling:
    capacity: str
    step: str
    sentence: str
    bars: tuple[Bar, ...]


def memory(workload: Workload, plan: Plan, planned: Module) -> Filling:
    """What each stage's ranks hold: weights and KV from the stage's own program, the rest as planned; what is
    beyond the promise last.
    """
    capacity = plan.memory.capacity_bytes
    shared = {k: v for k, v in plan.memory.parts.items() if k not in ("weights", "kv")}
    bars: list[Bar] = []
    for stage, (weights, kv) in zip(plan.stages, stage_bytes(plan, planned), strict=True):
        promised = kv * plan.promised_pages // plan.num_pages
        room = kv - promised + plan.memory.room_step_bytes
        parts = {"weights": weights, "kv": promised, **shared, "room": room}
        first, last = stage.first_layer, stage.first_layer + stage.num_layers - 1
        bars.append(
            Bar(
                name=f"stage {len(bars)}",
                layers=f"layer {first}" if first == last else f"layers {first} to {last}",
                total=format_bytes(sum(parts.values())),
                parts=tuple(
                    _part(name, format_bytes(size), _percent(size, capacity))
                    for name, size in parts.items()
                    if size
                ),
            )
        )
    pages = f"{plan.num_pages:,} pages of {plan.page_size} tokens in each layer, "
    pages += f"{plan.promised_pages:,} of them for the promise"
    if plan.host_pages:
        pages += f"; {plan.host_pages:,} more find room in a rank's share of host memory"
    if plan.layout.kvp > 1:
        tokens = workload.context + workload.output_tokens
        pages += f"; a request {growth_words(plan.layout.kvp, plan.stripe_tokens, tokens)}"
    return Filling(
        capacity=format_bytes(capacity),
        step=plan.memory.step,
        sentence=f"{pages}.",
        bars=tuple(bars),
    )


def stage_bytes(plan: Plan, planned: Module) -> list[tuple[int, int]]:
    """Weights and KV pages of one rank of each stage, from the types in its program."""
    result = []
    for program in planned.programs:
        weights = kv = 0
        for call in program.calls:
            for op in planned.functions[call.function].ops:
                if op.name == "param":
                    weights += call.count * int(op.type.local_bytes(planned.mesh))
                elif op.name == "cache":
                    _, two, heads, dim = op.type.local_shape(planned.mesh)
                    row = int(two) * int(heads) * int(dim) * op.type.itemsize
                    kv += call.count * plan.num_pages * plan.page_size * row
        result.append((weights, kv))
    return result
