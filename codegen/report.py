"""report.html: the plan as one page that needs nothing else. Numbers are formatted here, never in it.

Each section is one function here, from what is planned to a small frozen record, and one template
`templates/report/<section>.html.j2` that lays that record out. The page is their sequence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from markupsafe import Markup

from ..artifact import Memory, Plan, Prediction, Workload
from ..ir.graph import Module
from ..timeline import Iteration, Timeline
from ..units import format_bytes, format_count, format_duration
from . import charts
from .templating import render

SECTIONS = (
    "promise",
    "chunks",
    "pipeline",
    "memory",
    "alternatives",
    "why",
    "sources",
)
_SECTION_TITLES = {
    "chunks": "Chunks over the context",
    "pipeline": "The pipeline",
    "memory": "Memory of a rank",
    "alternatives": "What else was possible",
    "why": "Why this plan",
    "sources": "Where the figures come from",
}
_OBJECTIVES = {"gpus": "fewest GPUs", "ttft": "least TTFT", "throughput": "most throughput"}
_MANY = 8  # chunks, from which on it is worth saying how they change
_LABELS = {"kv": "KV cache", "activation": "activations", "bubble": "pipeline fill"}


@dataclass(frozen=True)
class Report:
    """What the page is made from. `cluster`: as in the manifest; `planned`: the module per stage."""

    model: str
    cluster: Mapping[str, Any]
    workload: Workload
    plan: Plan
    planned: Module
    timeline: Timeline


def render_report(report: Report) -> str:
    """The page's HTML."""
    plan, workload = report.plan, report.workload
    device = "worker" if plan.target == "cpu" else "GPU"
    layout = plan.layout
    return render(
        "report/page.html.j2",
        model=report.model,
        cluster=report.cluster["name"],
        context=format_count(workload.context),
        facts=[
            ("context", f"{workload.context:,} tokens"),
            ("output", f"{workload.output_tokens:,} tokens"),
            ("at once", f"{workload.concurrency:,}"),
            ("objective", _OBJECTIVES.get(workload.objective, workload.objective)),
            ("code", f"{plan.dtype}, {plan.target}"),
            ("device", report.cluster["device"]),
        ],
        ranks=f"{plan.gpus:,} {device}{'s' if plan.gpus > 1 else ''}",
        axes=[
            (layout.tp, "tensor", "heads and columns"),
            (layout.spp, "pipeline", "stages of layers"),
            (layout.kvp, "sequence", "groups of KV cache"),
        ],
        sections=[name for name in SECTIONS if name != "alternatives" or plan.alternatives],
        titles=_SECTION_TITLES,
        promise=promise(workload, plan),
        chunks=chunks(workload, plan, report.timeline),
        pipeline=pipeline(plan, report.timeline),
        memory=memory(plan, report.planned),
        alternatives=alternatives(workload, plan),
        why=why(plan),
        sources=sources(report.cluster),
    )


# ------------------------------------------------------------------------------------------- promise


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
            (sum(_memory_parts(held).values()), held.capacity_bytes),
            format_bytes,
            _memory_parts(held),
        ),
    )
    remarks = (
        f"{said.throughput_tokens_per_s:,.0f} tokens per second in steady decode, "
        f"{_prefill_rate(workload, said):,.0f} in prefill.",
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


def _memory_parts(held: Memory) -> dict[str, float]:
    """What fills a rank, by name: every field but the capacity."""
    return {
        field.name.removesuffix("_bytes"): getattr(held, field.name)
        for field in fields(held)
        if field.name != "capacity_bytes"
    }


# -------------------------------------------------------------------------------------------- chunks


@dataclass(frozen=True)
class Table:
    """A chart's figures, for those who read rather than look. align: "l" or "r" by column."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Chunks:
    """Two charts with one cursor, what it reads by chunk (as JSON), and where it stands at first."""

    sentence: str
    sizes: Markup
    times: Markup
    parts: tuple[str, ...]
    readings: Markup
    first: int
    last: int
    table: Table


def chunks(workload: Workload, plan: Plan, timeline: Timeline) -> Chunks:
    """Chunk size and iteration time over the context."""
    iterations = timeline.iterations
    parts = charts.parts_shown(iterations)
    stages = plan.layout.spp
    limit_s = workload.tbt_s / stages
    limit = "TBT promise" if stages == 1 else f"TBT promise ÷ {stages} stages"
    limit = f"{format_duration(limit_s)}: {limit}"
    sizes = [rule.chunk for rule in plan.chunks]
    return Chunks(
        sentence=_chunk_sentence(timeline, min(sizes), max(sizes)),
        sizes=charts.both(partial(charts.chunk_sizes, plan, timeline)),
        times=charts.both(partial(charts.iteration_times, timeline, limit_s, limit)),
        parts=parts,
        readings=Markup(json.dumps([_reading(i, parts, timeline) for i in iterations])),
        first=len(iterations) // 2,
        last=len(iterations) - 1,
        table=Table(
            ("chunk", "after tokens", "size", "groups", "iteration", *parts),
            tuple(
                (
                    f"{i.number:,}",
                    f"{i.start:,}",
                    f"{i.tokens:,}",
                    str(i.groups),
                    format_duration(i.seconds),
                    *(format_duration(i.parts_s[part]) for part in parts),
                )
                for i in iterations
            ),
        ),
    )


def _chunk_sentence(timeline: Timeline, smallest: int, largest: int) -> str:
    count = timeline.num_chunks
    if count < _MANY or smallest == largest:
        many = f"{count:,} chunk{'s' if count > 1 else ''} of"
        bound = "" if smallest == largest else " at most"
        return f"The prompt is prefilled in {many}{bound} {largest:,} tokens."
    seconds = sorted(i.seconds for i in timeline.iterations[:-1])
    return (
        f"The prompt is prefilled in {count:,} chunks. They begin with {largest:,} tokens and shrink "
        f"to {smallest:,} as attention reads more, so that an iteration takes "
        f"{_whole(seconds[0])} to {_whole(seconds[-1])} all along."
    )


def _whole(seconds: float) -> str:
    """A duration that no line break parts from its unit."""
    return format_duration(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def _reading(i: Iteration, parts: Sequence[str], timeline: Timeline) -> dict[str, object]:
    return {
        "chunk": f"{i.number:,} of {timeline.num_chunks:,}",
        "start": f"{i.start:,}",
        "size": f"{i.tokens:,}",
        "groups": str(i.groups),
        "time": format_duration(i.seconds),
        "parts": [format_duration(i.parts_s[part]) for part in parts],
    }


# ------------------------------------------------------------------------------------------ pipeline


@dataclass(frozen=True)
class Pipeline:
    """views: (caption, chart) of the beginning and of the end."""

    sentence: str
    views: tuple[tuple[str, Markup], ...]
    table: Table


def pipeline(plan: Plan, timeline: Timeline) -> Pipeline:
    """How the first and the last chunks pass the stages."""
    stages, count = plan.layout.spp, timeline.num_chunks
    kinds = [("The beginning", timeline.filling), ("The end", timeline.draining)]
    if not timeline.draining:
        kinds = [("The whole prompt", timeline.filling)]
    slots = (*timeline.filling, *timeline.draining)
    leaves = f"the last leaves after {_whole(timeline.end_s)}."
    passing = f"{count:,} chunks pass {stages} stages one behind the other; "
    return Pipeline(
        sentence=passing + leaves
        if stages > 1
        else f"One stage, so chunks do not overlap; {leaves}",
        views=tuple(
            (
                f"{name}: chunks {slots[0].number:,} to {slots[-1].number:,}",
                charts.both(partial(charts.pipeline, slots, stages)),
            )
            for name, slots in kinds
        ),
        table=Table(
            ("chunk", "stage", "enters after", "takes"),
            tuple(
                (
                    f"{slot.number:,}",
                    str(slot.stage),
                    format_duration(slot.begin_s) if slot.begin_s else "0",
                    format_duration(slot.end_s - slot.begin_s),
                )
                for slot in sorted(slots, key=lambda s: (s.number, s.stage))
            ),
        ),
    )


# -------------------------------------------------------------------------------------------- memory


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
    sentence: str
    bars: tuple[Bar, ...]


def memory(plan: Plan, planned: Module) -> Filling:
    """What each stage's ranks hold: weights and KV from the stage's own program, the rest as planned."""
    capacity = plan.memory.capacity_bytes
    shared = {k: v for k, v in _memory_parts(plan.memory).items() if k not in ("weights", "kv")}
    bars: list[Bar] = []
    for stage, (weights, kv) in zip(plan.stages, stage_bytes(plan, planned), strict=True):
        parts = {"weights": weights, "kv": kv, **shared}
        first, last = stage.first_layer, stage.first_layer + stage.num_layers - 1
        bars.append(
            Bar(
                name=f"stage {len(bars)}",
                layers=f"layer {first}" if first == last else f"layers {first} to {last}",
                total=format_bytes(sum(parts.values())),
                parts=tuple(
                    _part(name, format_bytes(size), _percent(size, capacity))
                    for name, size in parts.items()
                ),
            )
        )
    pages = (
        f"{plan.num_pages:,} pages of {plan.page_size} tokens in each layer; a request takes on its next "
        f"group after {plan.group_tokens:,} tokens."
        if plan.layout.kvp > 1
        else f"{plan.num_pages:,} pages of {plan.page_size} tokens in each layer."
    )
    return Filling(
        capacity=format_bytes(capacity),
        sentence=pages,
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


# -------------------------------------------------------------------------------------- alternatives


@dataclass(frozen=True)
class Choice:
    """A layout with what it gives; broken: which promises it breaks."""

    layout: str
    gpus: str
    ttft: str
    tbt: str
    reason: str
    broken: tuple[str, ...] = ()
    chosen: bool = False


def alternatives(workload: Workload, plan: Plan) -> tuple[Choice, ...]:
    """The chosen layout first, then the best others."""
    said = plan.predicted
    rows = [
        Choice(
            str(plan.layout),
            f"{plan.gpus:,}",
            format_duration(said.ttft_s),
            format_duration(said.tbt_s),
            "chosen",
            chosen=True,
        )
    ]
    for other in plan.alternatives:
        known = other.ttft_s > 0
        limits = (
            ("ttft", known and other.ttft_s > workload.ttft_s),
            ("tbt", other.tbt_s > workload.tbt_s),
        )
        rows.append(
            Choice(
                str(other.layout),
                f"{other.gpus:,}",
                format_duration(other.ttft_s) if known else "–",
                format_duration(other.tbt_s),
                other.reason,
                tuple(name for name, breaks in limits if breaks),
            )
        )
    return tuple(rows)


# ------------------------------------------------------------------------------------ why, and whence


def why(plan: Plan) -> tuple[str, ...]:
    """What binds and what next, in sentences, and what the solver proved."""
    proven = plan.optimality
    return (
        *plan.notes,
        f"Proven optimal in {proven.minimised} to a gap of {proven.gap:.2%} "
        f"(objective {proven.objective:.6g}, bound {proven.bound:.6g}).",
    )


@dataclass(frozen=True)
class Figure:
    """A number of the cluster file: key, value with unit, the kind of its source, and the source."""

    key: str
    value: str
    kind: str
    source: str


@dataclass(frozen=True)
class Sources:
    sentence: str
    figures: tuple[Figure, ...]


def sources(cluster: Mapping[str, Any]) -> Sources:
    """Every number of the cluster, with its source."""
    figures = tuple(
        Figure(key, _quantity(entry["value"], entry["unit"]), *_kind(entry["source"]))
        for key, entry in cluster["numbers"].items()
    )
    kinds = Counter(figure.kind for figure in figures if figure.kind)
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    return Sources(f"{len(figures)} figures of {cluster['name']}: {counted}.", figures)


def _kind(source: str) -> tuple[str, str]:
    """A source's kind is the word before its first colon, where there is one."""
    kind, colon, rest = source.partition(": ")
    if colon and kind.isalpha():
        return kind, rest
    return "", source


def _quantity(value: float, unit: str) -> str:
    """A base-unit number as people write it."""
    if unit == "s":
        return format_duration(value) if value else "0 s"
    if unit == "B":
        return format_bytes(value)
    if unit in ("B/s", "FLOP/s"):
        return f"{_scaled(value)}{unit}"
    if unit == "1":
        return f"{value:.0%}"
    return f"{value:,.4g} {unit}"


def _scaled(value: float) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g} "
