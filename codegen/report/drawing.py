"""Drawings as SVG text: scales, axes and shapes, each a pure function. Colours are CSS classes.

Coordinates are pixels of a drawing of fixed width; a page holds one for wide and one for narrow screens,
so that text is never scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Values low..high → pixels start..stop; by their logarithm if `log`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """At most so many round values within the scale; fewer where they would not be round."""
        return _log_ticks(self.low, self.high, most) if self.log else self._linear_ticks(most)

    def _linear_ticks(self, most: int) -> list[float]:
        span = self.high - self.low
        raw = span / max(1, most - 1)
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**e for e in decades for d in digits]
        ticks = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def ceiling(value: float) -> float:
    """A round number at or a little above a positive value, for the end of an axis."""
    unit = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(s * unit for s in steps if s * unit >= value * (1 - 1e-9))


# ------------------------------------------------------------------------------------------ elements


def number(value: float) -> str:
    """Pixels, to a tenth."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


def element(name: str, body: Markup | str = "", **attributes: object) -> Markup:
    """An SVG element; `class_` is class, `data_x` data-x, floats are pixels."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
    )
    inner = escape(body)
    return Markup(f"<{name}{text}>{inner}</{name}>" if inner else f"<{name}{text}/>")


def _attribute(value: object) -> str:
    return number(value) if isinstance(value, float) else str(escape(value))


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(parts)


def text(x: float, y: float, words: str, class_: str, anchor: str = "start") -> Markup:
    return element("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def line(a: Point, b: Point, class_: str) -> Markup:
    return element("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], class_=class_)


def rect(
    x: float, y: float, width: float, height: float, class_: str, *, body: str = "", **more: object
) -> Markup:
    return element("rect", body, x=x, y=y, width=width, height=height, class_=class_, **more)


def path(
    points: Sequence[Point],
    class_: str,
    *,
    closed: bool = False,
    body: Markup | str = "",
    **more: object,
) -> Markup:
    steps = " L".join(f"{number(x)} {number(y)}" for x, y in points)
    return element("path", body, d=f"M{steps}{'Z' if closed else ''}", class_=class_, **more)


def svg(width: int, height: int, body: Iterable[Markup], *, title: str, class_: str) -> Markup:
    return element(
        "svg",
        join(body),
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        class_=class_,
        role="img",
        aria_label=title,
    )


# --------------------------------------------------------------------------------------------- frame


@dataclass(frozen=True)
class Frame:
    """The box that values are drawn into."""

    left: float
    top: float
    right: float
    bottom: float


def x_axis(frame: Frame, x: Scale, ticks: Iterable[tuple[float, str]], unit: str) -> list[Markup]:
    """Ticks and their labels under the frame, what they count at its right end."""
    marks = [line((frame.left, frame.bottom), (frame.right, frame.bottom), "axis")]
    for value, label in ticks:
        at = x(value)
        marks.append(line((at, frame.bottom), (at, frame.bottom + 4), "axis"))
        marks.append(text(at, frame.bottom + 17, label, "tick", "middle"))
    marks.append(text(frame.right, frame.bottom + 33, unit, "unit", "end"))
    return marks


def y_axis(frame: Frame, y: Scale, ticks: Iterable[tuple[float, str]]) -> list[Markup]:
    """Hairlines across the frame, with their labels to the left."""
    marks = []
    for value, label in ticks:
        at = y(value)
        marks.append(line((frame.left, at), (frame.right, at), "grid"))
        marks.append(text(frame.left - 8, at + 4, label, "tick", "end"))
    return marks
