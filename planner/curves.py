"""How efficiency grows with size: points that were measured or published, and the curve through them.

    e(x) = full · x / (x + half)

is Hockney's n-half model ("r∞, n½"): at size `half` a kernel reaches half of what it reaches at best. It
says that a call costs what its work costs at full efficiency plus a fixed `half` units more,

    seconds(x) = x / e(x) / peak = (x + half) / (full · peak),

so every cost stays affine in the sizes of `ir.sizes`. Fitted as 1/e = a + b/x with a = 1/full ≥ 1 and
b = half/full ≥ 0: exact for two points, for more the least squares of the relative errors. One point is
a constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from ..units import format_count

Points = tuple[tuple[float, float], ...]

WIDEST_GAP = 10_000
"""Neighbouring points further apart than this factor say nothing about what lies between them."""


@dataclass(frozen=True)
class Curve:
    """Shares of a peak or bandwidth by size (in `unit`), the curve through them, and its worst miss.

    residual: the largest relative error of the curve at its own points
    """

    points: Points
    unit: str
    source: str
    full: float
    half: float
    residual: float

    def share(self, size: float) -> float:
        return self.full * size / (size + self.half)

    @property
    def smallest(self) -> float:
        return self.points[0][0]

    @property
    def largest(self) -> float:
        return self.points[-1][0]


def constant(share: float, unit: str, source: str) -> Curve:
    """The same share at every size, of which none was measured."""
    return Curve((), unit, source, share, 0.0, 0.0)


def through(points: Sequence[tuple[float, float]], unit: str, source: str) -> Curve:
    """The curve that fits the points (ascending sizes > 0, shares in (0, 1]) best."""
    a, b = _fit(points)
    misses = [abs((a + b / x) * e - 1) for x, e in points]
    return Curve(tuple(points), unit, source, 1 / a, b / a, max(misses))


def _fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a ≥ 1 and b ≥ 0 that minimise Σ ((a + b/x)·e − 1)²: unconstrained, else the better border."""
    if len(points) == 1:
        return 1 / points[0][1], 0.0
    u = [e for _, e in points]
    v = [e / x for x, e in points]
    uu, uv, vv = _dot(u, u), _dot(u, v), _dot(v, v)
    determinant = uu * vv - uv * uv
    if determinant > 0:
        a = (sum(u) * vv - sum(v) * uv) / determinant
        b = (sum(v) * uu - sum(u) * uv) / determinant
        if a >= 1 and b >= 0:
            return a, b

    def missed(ab: tuple[float, float]) -> float:
        return sum((ab[0] * p + ab[1] * q - 1) ** 2 for p, q in zip(u, v, strict=True))

    flat = max(1.0, sum(u) / uu), 0.0
    steep = 1.0, max(0.0, (sum(v) - uv) / vv)
    return min(flat, steep, key=missed)


def _dot(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(p, q, strict=True))


# -------------------------------------------------------------------------------------------- reading


def read_curve(entry: Any, key: str, sizes: Mapping[str, float], where: str) -> Curve:
    """A curve from its TOML entry, in either form. sizes: units of its sizes, the base unit first."""
    how = (
        f'write {key} = {{ points = [[SIZE, SHARE], ...], unit = "{next(iter(sizes))}", '
        f'source = "..." }}, or {{ value = SHARE, unit = "1", source = "..." }} for every size'
    )
    if not isinstance(entry, dict) or set(entry) not in (
        {"points", "unit", "source"},
        {"value", "unit", "source"},
    ):
        raise BadInput(f"{key} must be a curve", where=where, got=entry, do=how)
    source, unit = entry["source"], entry["unit"]
    if not isinstance(source, str) or not source.strip():
        raise BadInput(f"{key} has no source", where=where, got=source)
    if "value" in entry:
        if unit != "1":
            raise BadInput(f"{key} has a wrong unit", where=where, got=unit, do=how)
        share = _number(entry["value"], f"{key}", where)
        _check_share(share, key, where)
        return constant(share, next(iter(sizes)), source)
    if unit not in sizes:
        raise BadInput(f"{key} has a wrong unit", where=where, got=unit, do=how)
    points = _points(entry["points"], key, where, how)
    in_base = tuple((size * sizes[unit], share) for size, share in points)
    return through(in_base, next(iter(sizes)), source)


def _points(listed: Any, key: str, where: str, how: str) -> Points:
    if not isinstance(listed, list) or not listed:
        raise BadInput(f"{key} has no points", where=where, got=listed, do=how)
    points = []
    for pair in listed:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadInput(f"a point of {key} is not [SIZE, SHARE]", where=where, got=pair, do=how)
        size, share = (_number(number, f"a point of {key}", where) for number in pair)
        if size <= 0:
            raise BadInput(f"a size of {key} must be positive", where=where, got=size)
        _check_share(share, key, where)
        points.append((size, share))
    for (small, low), (large, high) in itertools.pairwise(points):
        between = f"[{small:g}, {low:g}] to [{large:g}, {high:g}]"
        if large <= small:
            do = "sort the points by size and name each size once"
            raise BadInput(f"sizes of {key} do not ascend", where=where, got=between, do=do)
        if high < low:
            do = "measure again, or give the smaller share for both sizes"
            raise BadInput(f"{key} falls as its size grows", where=where, got=between, do=do)
        if high / low > 2 * large / small:
            do = "measure again: more work would take half the time"
            raise BadInput(f"{key} jumps", where=where, got=between, do=do)
        if large / small > WIDEST_GAP:
            do = f"give a point between: neighbours may lie a factor of {WIDEST_GAP:,} apart"
            raise BadInput(f"{key} has a gap", where=where, got=between, do=do)
    return tuple(points)


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"{what} is not a number", where=where, got=value)
    return float(value)


def _check_share(share: float, key: str, where: str) -> None:
    if share <= 0:
        raise BadInput(f"{key} must be positive", where=where, got=share)
    if share > 1:
        raise BadInput(f"{key} is a share of a peak: at most 1", where=where, got=share)


def span(curve: Curve) -> str:
    """The sizes that its points span, in words."""
    if not curve.points:
        return "one figure for every size"
    return f"{format_count(round(curve.smallest))} to {format_count(round(curve.largest))} {curve.unit}"
