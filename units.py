"""Quantities as people write them: "10M" tokens, "400s", "30ms", "80 GiB"; and back again.

Counts use decimal steps (K = 1,000), as model vendors and the paper do ("10M tokens").
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from .errors import BadInput

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([a-zµ]*)\s*", re.IGNORECASE)


def parse_count(text: str, what: str) -> int:
    """A positive whole number: "4096", "128K", "10M", "1.5M"."""
    value, unit = _split(text, what, "a positive count such as 4096, 128K or 10M")
    scale = _COUNT.get(unit.lower())
    if scale is None or not 0 < value * scale < 10**18 or value * scale % 1:
        raise BadInput(f"{what} is not a positive count", got=text, do="write 4096, 128K or 10M")
    return int(value * scale)


def parse_duration_s(text: str, what: str) -> float:
    """A positive duration in seconds: "400s", "30ms", "5min", "1.5h". The unit is required."""
    value, unit = _split(text, what, "a positive duration such as 400s or 30ms")
    scale = _SECONDS.get(unit.lower())
    if scale is None or not 0 < value < 10**9:
        raise BadInput(
            f"{what} is not a positive duration", got=text, do="write it with a unit: 400s or 30ms"
        )
    return float(value) * scale


def _split(text: str, what: str, wanted: str) -> tuple[Decimal, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BadInput(f"{what} is not {wanted}", got=text)
    return Decimal(match[1].replace("_", "").replace(",", "")), match[2]


def format_count(value: float) -> str:
    """1_340_000 → "1.34M"."""
    for suffix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{_digits(value / scale)}{suffix}"
    return _digits(value)


def format_bytes(value: float) -> str:
    """80 * 2**30 → "80 GiB"."""
    for suffix, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{_digits(value / scale)} {suffix}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """0.0304 → "30.4 ms"; 372.1 → "372 s"; 7300 → "2 h 02 min"."""
    if not math.isfinite(seconds):
        return "never"
    if seconds < 1e-3:
        return f"{_digits(seconds * 1e6)} µs"
    if seconds < 1:
        return f"{_digits(seconds * 1e3)} ms"
    if seconds < 600:
        return f"{_digits(seconds)} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def _digits(value: float) -> str:
    """Three significant digits, no trailing zeros after the point."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
