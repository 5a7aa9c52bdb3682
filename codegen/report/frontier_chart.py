"""The frontier as one SVG of a given width: TTFT over the number of devices, a line for each TBT promise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ...alternatives import Frontier, Point
from ...artifact import Plan, Workload
from ...units import format_duration
from .charts import WIDE
from .drawing import Frame, Scale, element, join, line, path, svg, text, x_axis, y_axis

# Vertices of a mark around its centre: (radii, degrees clockwise from the right).
_STAR = [(1.6 if n % 2 == 0 else 0.7, 36.0 * n - 90) for n in range(10)]
_PLUS = [
    (r, q + d)
    for q in (0.0, 90.0, 180.0, 270.0)
    for r, d in ((1.5, -20.0), (1.5, 20.0), (0.7, 45.0))
]
SHAPES: tuple[Sequence[tuple[float, float]], ...] = (
    [(1.1, 22.5 * n) for n in range(16)],  # a disc: the promise
    [(1.4, 90.0 * n + 45) for n in range(4)],
    [(1.5, 120.0 * n - 90) for n in range(3)],
    [(1.5, 90.0 * n) for n in range(4)],
    [(1.5, 120.0 * n + 90) for n in range(3)],
    _STAR,
    _PLUS,
    [(r, a + 45) for r, a in _PLUS],
)
_RADIUS = 3.6
_APART = 13  # pixels from one label to the next


@dataclass(frozen=True)
class Level:
    """A TBT promise: its shape, and whether its plans keep the TBT that was asked."""

    tbt_s: float
    shape: int
    asked: bool
    kept: bool

    @property
    def class_(self) -> str:
        return "asked" if self.asked else "tighter" if self.kept else "laxer"


def levels_of(frontier: Frontier, workload: Workload) -> tuple[Level, ...]:
    """The TBT promises that have points of their own, ascending; shapes by distance to the asked."""
    asked = workload.tbt_s
    own = {level_s(frontier, point) for point in frontier.points} | {asked}
    near = sorted(own, key=lambda s: abs(math.log(s / asked)))
    shapes = {tbt_s: n % len(SHAPES) for n, tbt_s in enumerate(near)}
    return tuple(Level(s, shapes[s], s == asked, s <= asked) for s in sorted(own))


def level_s(frontier: Frontier, point: Point) -> float:
    """The strictest of the TBT promises that a point keeps."""
    return min(tbt_s for tbt_s in frontier.tbt_s if point.tbt_s <= tbt_s)


def keeps(point: Point, workload: Workload) -> bool:
    """Both promises."""
    return point.ttft_s <= workload.ttft_s and point.tbt_s <= workload.tbt_s


def mark(
    shape: int,
    x: float,
    y: float,
    radius: float,
    class_: str,
    body: Markup | str = "",
    **more: object,
) -> Markup:
    """One mark of a shape, as an SVG path."""
    at = [
        (x + r * radius * math.cos(math.radians(a)), y + r * radius * math.sin(math.radians(a)))
        for r, a in SHAPES[shape]
    ]
    return path(at, class_, closed=True, body=body, **more)


def swatch(level: Level) -> Markup:
    """A level's mark beside its name."""
    drawn = mark(level.shape, 8.0, 8.0, 4.4, f"dot {level.class_}")
    return element(
        "svg", join([drawn]), viewBox="0 0 16 16", width=16, height=16, aria_hidden="true"
    )


def frontier_chart(
    frontier: Frontier,
    workload: Workload,
    plan: Plan,
    words: Sequence[str],
    width: int,
    class_: str,
) -> Markup:
    """Both axes logarithmic. words: what a pointer reads over each point."""
    wide = width == WIDE
    frame = Frame(62, 12, width - (84 if wide else 12), 316 if wide else 270)
    x = _padded([p.gpus for p in frontier.points], 1.12, frame.left, frame.right)
    promise_s = _in_sight(workload.ttft_s, [p.ttft_s for p in frontier.points])
    y = _padded([p.ttft_s for p in frontier.points] + promise_s, 1.15, frame.bottom, frame.top)
    body = y_axis(frame, y, [(s, _clock(s)) for s in _ticks(y, 7, _CLOCK)])
    counts = _ticks(x, 9 if wide else 6, _COUNTS)
    devices = "workers" if plan.target == "cpu" else "GPUs"
    body += x_axis(frame, x, [(n, f"{n:,.0f}") for n in counts if n == int(n)], devices)
    body.append(element("rect", x=frame.left, y=frame.top, width=frame.right - frame.left,
                        height=frame.bottom - frame.top, class_="field"))  # fmt: skip
    levels = levels_of(frontier, workload)
    for level in sorted(levels, key=lambda it: it.asked):
        body.append(path(_stairs(frontier, level, x, y, frame), f"stairs {level.class_}"))
    for limit_s in promise_s:
        body.append(line((frame.left, y(limit_s)), (frame.right, y(limit_s)), "limit"))
        label = f"TTFT promise {format_duration(limit_s)}"
        body.append(text(frame.left + 4, y(limit_s) - 6, label, "limit-label"))
    shapes = {level.tbt_s: level for level in levels}
    for number, (point, said) in enumerate(zip(frontier.points, words, strict=True)):
        level = shapes[level_s(frontier, point)]
        at = x(point.gpus), y(point.ttft_s)
        shown = f"dot {level.class_}{' kept' if keeps(point, workload) else ''}"
        title = element("title", said) if wide else ""
        body.append(
            mark(
                level.shape,
                *at,
                _RADIUS,
                shown,
                body=title,
                data_i=number,
                data_cx=at[0],
                data_cy=at[1],
            )
        )
    body += _chosen(plan, x, y, frame)
    if wide:
        body += _labels(frontier, levels, y, frame)
    body.append(element("circle", class_="cursor", r=8.0, cx=frame.left, cy=frame.top))
    title = f"Least TTFT over the number of {devices}, for each TBT promise"
    return svg(width, round(frame.bottom + 40), body, title=title, class_=f"chart {class_}")


def _padded(values: Sequence[float], room: float, start: float, stop: float) -> Scale:
    return Scale(min(values) / room, max(values) * room, start, stop, log=True)


def _in_sight(limit_s: float, values: Sequence[float]) -> list[float]:
    """The promise, unless it is so far off that the points would shrink to a line."""
    return [limit_s] if min(values) / 4 <= limit_s <= max(values) * 4 else []


def _stairs(
    frontier: Frontier, level: Level, x: Scale, y: Scale, frame: Frame
) -> list[tuple[float, float]]:
    """The least TTFT of a plan of at most so many devices that keeps a level's TBT."""
    best = math.inf
    corners: list[tuple[float, float]] = []
    for point in frontier.points:
        if point.tbt_s <= level.tbt_s and point.ttft_s < best:
            before = best
            best = point.ttft_s
            corners += [(x(point.gpus), y(before))] if before < math.inf else []
            corners.append((x(point.gpus), y(best)))
    return [*corners, (frame.right, corners[-1][1])] if corners else []


def _chosen(plan: Plan, x: Scale, y: Scale, frame: Frame) -> list[Markup]:
    """A ring about this plan, and its name where there is room."""
    at = x(plan.gpus), y(plan.predicted.ttft_s)
    right = at[0] < (frame.left + frame.right) / 2
    return [
        element("circle", class_="chosen-ring", r=_RADIUS + 4, cx=at[0], cy=at[1]),
        text(at[0], at[1] + 22, "this plan", "chosen-label", "start" if right else "end"),
    ]


def _labels(
    frontier: Frontier, levels: Sequence[Level], y: Scale, frame: Frame
) -> Iterator[Markup]:
    """Each level's name at the end of its line, the asked one's first, where they do not overlap."""
    taken: list[float] = []
    for level in sorted(levels, key=lambda it: (not it.asked, it.tbt_s)):
        within = [p.ttft_s for p in frontier.points if p.tbt_s <= level.tbt_s]
        at = y(min(within)) if within else math.inf
        if within and all(abs(at - other) >= _APART for other in taken):
            taken.append(at)
            name = f"TBT {format_duration(level.tbt_s)}"
            yield text(frame.right + 6, at + 4, name, f"level {level.class_}")


# -------------------------------------------------------------------------------------------- ticks

_COUNTS = [1, *(n << e for e in range(20) for n in (2, 3))]
_CLOCK = [
    *(digit * 10.0**e for e in range(-6, 1) for digit in (1, 2, 5)),
    *(10.0, 30.0),
    *(60.0 * n for n in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1440)),
]


def _ticks(scale: Scale, most: int, steps: Sequence[float]) -> list[float]:
    """Of the given steps every one within, or every so-manieth; of too few, round values between."""
    within = [s for s in steps if scale.low <= s <= scale.high]
    if len(within) < 3:
        return Scale(scale.low, scale.high, 0.0, 1.0).ticks(most)
    return within[:: math.ceil(len(within) / most)]


def _clock(seconds: float) -> str:
    """A duration of a tick: "30 s", "5 min", "2 h"."""
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= scale and seconds % scale == 0:
            return f"{seconds / scale:.0f} {unit}"
    return format_duration(seconds)
