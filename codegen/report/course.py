"""The prompt's course: its chunks over the context, and their way through the pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from ...artifact import Plan, Workload
from ...timeline import Iteration, Timeline
from ...units import format_duration
from . import charts

_MANY = 8  # chunks, from which on it is worth saying how they change


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
    chunk, took = f"{i.number:,} of {timeline.num_chunks:,}", format_duration(i.seconds)
    return {
        "said": f"chunk {chunk}, {i.tokens:,} tokens after {i.start:,}, {took}",
        "chunk": chunk,
        "start": f"{i.start:,}",
        "size": f"{i.tokens:,}",
        "groups": str(i.groups),
        "time": took,
        "parts": [format_duration(i.parts_s[part]) for part in parts],
    }


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
