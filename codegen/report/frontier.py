"""What else the devices could do: the frontier of GPUs, TTFT and TBT, and what a little more would buy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from ...alternatives import Frontier, Point
from ...artifact import Plan, Workload
from ...units import format_duration
from ...wording import devices_word, what_ifs
from .charts import both
from .course import Table
from .frontier_chart import frontier_chart, keeps, level_s, levels_of, swatch


@dataclass(frozen=True)
class Mark:
    """A TBT promise in the legend; note says how it stands to the one that was asked."""

    drawn: Markup
    name: str
    note: str


@dataclass(frozen=True)
class Drawing:
    """The chart, its legend, what its cursor reads by point (as JSON), and where it stands at first."""

    sentence: str
    devices: str
    chart: Markup
    marks: tuple[Mark, ...]
    readings: Markup
    first: int
    last: int
    table: Table


@dataclass(frozen=True)
class Edge:
    """drawing: None if no frontier was asked for; what_ifs: the figure that moves, laxer, stricter."""

    drawing: Drawing | None
    what_ifs: tuple[tuple[str, ...], ...]


def edge(workload: Workload, plan: Plan) -> Edge:
    """The frontier, where the plan has one, and the marginals."""
    frontier = plan.frontier
    rows = tuple((change, *cells) for change, cells in what_ifs(plan).items())
    drawn = _drawing(workload, plan, frontier) if frontier and frontier.points else None
    return Edge(drawn, rows)


def _drawing(workload: Workload, plan: Plan, frontier: Frontier) -> Drawing:
    points, devices = frontier.points, devices_word(plan)
    words = [_words(point, devices) for point in points]
    own = plan.gpus, plan.predicted.ttft_s
    first = min(range(len(points)), key=lambda i: _distance(points[i], *own))
    return Drawing(
        sentence=_sentence(workload, points, devices),
        devices=devices,
        chart=both(partial(frontier_chart, frontier, workload, plan, words)),
        marks=tuple(
            Mark(
                swatch(level),
                format_duration(level.tbt_s),
                "as promised" if level.asked else "tighter" if level.kept else "breaks the promise",
            )
            for level in levels_of(frontier, workload)
        ),
        readings=Markup(
            json.dumps([_reading(i, frontier, workload, words[i]) for i in range(len(points))])
        ),
        first=first,
        last=len(points) - 1,
        table=Table(
            (devices, "TTFT", "TBT kept", "layout", "promises"),
            tuple(
                (
                    f"{point.gpus:,}",
                    format_duration(point.ttft_s),
                    format_duration(point.tbt_s),
                    str(point.layout),
                    _verdict(point, workload),
                )
                for point in points
            ),
        ),
    )


def _distance(point: Point, gpus: int, ttft_s: float) -> float:
    return abs(point.gpus / gpus - 1) + abs(point.ttft_s / ttft_s - 1)


def _sentence(workload: Workload, points: Sequence[Point], devices: str) -> str:
    kept = sum(keeps(point, workload) for point in points)
    return (
        f"{len(points):,} plans that no other beats in {devices}, TTFT and TBT at once, each the exact "
        f"optimum for its {devices} and a TBT promise. {kept:,} of them "
        f"keep{'s' if kept == 1 else ''} both promises."
    )


def _words(point: Point, devices: str) -> str:
    return (
        f"{point.gpus:,} {devices}: TTFT {format_duration(point.ttft_s)}, "
        f"TBT {format_duration(point.tbt_s)}, {point.layout}"
    )


def _verdict(point: Point, workload: Workload) -> str:
    broken = [
        name
        for name, breaks in (
            ("TTFT", point.ttft_s > workload.ttft_s),
            ("TBT", point.tbt_s > workload.tbt_s),
        )
        if breaks
    ]
    return f"breaks {' and '.join(broken)}" if broken else "keeps both"


def _reading(i: int, frontier: Frontier, workload: Workload, words: str) -> dict[str, str]:
    point = frontier.points[i]
    verdict = _verdict(point, workload)
    return {
        "said": f"{words}, {verdict}",
        "point": f"{i + 1:,} of {len(frontier.points):,}",
        "gpus": f"{point.gpus:,}",
        "ttft": format_duration(point.ttft_s),
        "tbt": format_duration(point.tbt_s),
        "level": format_duration(level_s(frontier, point)),
        "layout": str(point.layout),
        "verdict": verdict,
    }
