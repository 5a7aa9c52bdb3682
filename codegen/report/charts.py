"""The report's charts, each from typed data to one SVG of a given width."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from markupsafe import Markup

from ...artifact import ChunkRule, Plan
from ...timeline import Iteration, Slot, Timeline
from ...units import format_count, format_duration
from .drawing import (
    Frame,
    Scale,
    ceiling,
    element,
    join,
    line,
    path,
    rect,
    svg,
    text,
    x_axis,
    y_axis,
)

WIDE, NARROW = 760, 328
_LEFT, _RIGHT, _FOOT = 62, 12, 40
_ROW = 26


def both(draw: Callable[[int, str], Markup]) -> Markup:
    """A chart for wide and for narrow screens; the style sheet shows one of them."""
    return join((draw(WIDE, "wide"), draw(NARROW, "narrow")))


def _context_scale(iterations: Sequence[Iteration], width: int) -> Scale:
    first, last = iterations[0].end, iterations[-1].end
    low = min(first, last / 10)
    return Scale(low, last, _LEFT, width - _RIGHT, log=True)


def _context_axis(frame: Frame, x: Scale, width: int) -> list[Markup]:
    ticks = x.ticks(10 if width == WIDE else 5)
    return x_axis(frame, x, [(t, format_count(t)) for t in ticks], "tokens of the prompt done")


# ----------------------------------------------------------------------------------- over the context


def chunk_sizes(plan: Plan, timeline: Timeline, width: int, class_: str) -> Markup:
    """Chunk size by context, both axes logarithmic, with the places where one more group joins."""
    frame = Frame(_LEFT, 22, width - _RIGHT, 172)
    x = _context_scale(timeline.iterations, width)
    sizes = [rule.chunk for rule in plan.chunks]
    y = Scale(min(sizes) / 1.4, max(sizes) * 1.4, frame.bottom, frame.top, log=True)
    body = y_axis(frame, y, [(t, f"{t:,.0f}") for t in y.ticks(6)])
    body += _context_axis(frame, x, width)
    body += _joins(plan.chunks, frame, x)
    body.append(path(_steps(plan.chunks, x, y), "stroke-main"))
    body += _pointer(timeline.iterations, frame, x)
    title = "Chunk size in tokens over the tokens of the prompt that are done"
    return svg(width, round(frame.bottom + _FOOT), body, title=title, class_=f"chart {class_}")


def _steps(rules: Sequence[ChunkRule], x: Scale, y: Scale) -> list[tuple[float, float]]:
    return [(x(edge), y(rule.chunk)) for rule in rules for edge in (rule.start, rule.end)]


def _joins(rules: Sequence[ChunkRule], frame: Frame, x: Scale) -> list[Markup]:
    """A hairline with the number of groups, where it grows."""
    marks = []
    labelled = frame.left
    for before, rule in itertools.pairwise(rules):
        if rule.groups == before.groups:
            continue
        at = x(rule.start)
        marks.append(line((at, frame.top), (at, frame.bottom), "join"))
        if at - labelled > 14:
            marks.append(text(at, frame.top - 7, str(rule.groups), "join-label", "middle"))
            labelled = at
    if marks:
        marks.append(text(frame.left, frame.top - 7, "KVP groups: 1", "join-label"))
    return marks


def iteration_times(
    timeline: Timeline, limit_s: float, limit: str, width: int, class_: str
) -> Markup:
    """Seconds of the slowest stage by part, stacked, under the most that the promise leaves to it."""
    iterations = timeline.iterations
    frame = Frame(_LEFT, 14, width - _RIGHT, 214)
    x = _context_scale(iterations, width)
    longest = max(i.seconds for i in iterations)
    shows_limit = limit_s < 3 * longest
    top = ceiling(1.06 * max(longest, limit_s if shows_limit else 0.0))
    y = Scale(0.0, top, frame.bottom, frame.top)
    body = y_axis(frame, y, [(t, format_duration(t) if t else "0") for t in y.ticks(5)])
    body += _context_axis(frame, x, width)
    floor = [0.0] * len(iterations)
    for part in parts_shown(iterations):
        roof = [low + i.parts_s[part] for low, i in zip(floor, iterations, strict=True)]
        edges = [
            *_ramp(iterations, roof, x, y),
            *reversed(_ramp(iterations, floor, x, y)),
        ]
        body.append(path(edges, f"part-{part}", closed=True))
        floor = roof
    if shows_limit:
        at = y(limit_s)
        body.append(line((frame.left, at), (frame.right, at), "limit"))
        body.append(text(frame.right, at - 6, limit, "limit-label", "end"))
    body += _pointer(iterations, frame, x)
    title = "Time of one iteration by part over the tokens of the prompt that are done"
    return svg(width, round(frame.bottom + _FOOT), body, title=title, class_=f"chart {class_}")


def parts_shown(iterations: Sequence[Iteration]) -> tuple[str, ...]:
    """Parts that take any time at all."""
    return tuple(p for p in iterations[0].parts_s if any(i.parts_s[p] > 0 for i in iterations))


def _ramp(
    iterations: Sequence[Iteration], heights: Sequence[float], x: Scale, y: Scale
) -> list[tuple[float, float]]:
    """Each sampled chunk as wide as it is, straight lines between."""
    return [
        (x(edge), y(height))
        for i, height in zip(iterations, heights, strict=True)
        for edge in (i.start, i.end)
    ]


def _pointer(iterations: Sequence[Iteration], frame: Frame, x: Scale) -> list[Markup]:
    """What the script needs: a cursor, and an area for each sampled chunk that selects it."""
    height = frame.bottom - frame.top
    centres = [x(i.end) for i in iterations]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    edges = [frame.left, *middles, frame.right]
    areas = [
        rect(low, frame.top, high - low, height, "hit", data_i=i, data_x1=centre, data_x2=centre)
        for i, (centre, low, high) in enumerate(zip(centres, edges, edges[1:], strict=False))
    ]
    return [line((centres[-1], frame.top), (centres[-1], frame.bottom), "cursor"), *areas]


# -------------------------------------------------------------------------------------- the pipeline


def pipeline(slots: Sequence[Slot], num_stages: int, width: int, class_: str) -> Markup:
    """Stages as rows, chunks as bars in time; a gap is a stage that waits."""
    begin, end = min(s.begin_s for s in slots), max(s.end_s for s in slots)
    frame = Frame(_LEFT, 6, width - _RIGHT, 6 + _ROW * num_stages)
    x = Scale(0.0, end - begin, frame.left, frame.right)
    body = [
        text(frame.left - 8, frame.top + _ROW * (s + 0.5) + 4, f"stage {s}", "tick", "end")
        for s in range(num_stages)
    ]
    for slot in slots:
        low, high = x(slot.begin_s - begin), x(slot.end_s - begin)
        row = frame.top + _ROW * slot.stage
        shade = "slot-even" if slot.number % 2 == 0 else "slot-odd"
        said = _said(slot) if width == WIDE else ""
        bar = max(0.5, high - low - 1)
        body.append(rect(low, row + 3, bar, _ROW - 6.0, shade, rx=2, body=said))
        label = f"{slot.number:,}"
        if high - low > 8 * len(label) + 6:
            body.append(text((low + high) / 2, row + _ROW / 2 + 4, label, "slot-label", "middle"))
    ticks = x.ticks(6 if width == WIDE else 4)
    body += x_axis(frame, x, [(t, format_duration(t) if t else "0") for t in ticks], "time")
    title = f"Chunks {slots[0].number:,} to {slots[-1].number:,} in the stages of the pipeline"
    return svg(width, round(frame.bottom + _FOOT), body, title=title, class_=f"chart {class_}")


def _said(slot: Slot) -> Markup:
    """What a pointer reads over a slot."""
    took = format_duration(slot.end_s - slot.begin_s)
    return element("title", f"chunk {slot.number:,} in stage {slot.stage}: {took}")
