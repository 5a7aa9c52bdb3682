"""docs/paper.md and the tables beside it: what a figure of the paper is, and how it is told."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass

NEAR = 0.15
"""A figure that is further off than this share needs its reason."""


@dataclass(frozen=True)
class Claim:
    """What the paper says: in words, and the values that agree with it; none where it gives no number.

    base: what it counts from: 1 where it gives a ratio as a change, so that errors are those of the change
    """

    words: str
    low: float = math.nan
    high: float = math.nan
    base: float = 0.0

    @property
    def wordy(self) -> bool:
        """It gives no number."""
        return math.isnan(self.low)

    def error(self, ours: float) -> float | None:
        """How far a value lies outside, as a share of the nearest value that agrees."""
        if self.wordy:
            return None
        agreed = min(max(ours, self.low), self.high)
        return (ours - self.base) / (agreed - self.base) - 1


def exactly(value: float) -> Claim:
    return Claim(number(value), value, value)


def change(ratio: float) -> Claim:
    """A ratio that the paper gives as a change: 1.16 for "+16 %"."""
    return Claim(number(ratio), ratio, ratio, base=1.0)


def at_least(value: float) -> Claim:
    return Claim(f"≥ {number(value)}", value, math.inf)


def at_most(value: float) -> Claim:
    return Claim(f"≤ {number(value)}", 0.0, value)


def between(low: float, high: float) -> Claim:
    return Claim(f"{number(low)} to {number(high)}", low, high)


@dataclass(frozen=True)
class Row:
    """One number. ours is None where no plan exists."""

    what: str
    unit: str
    paper: Claim
    ours: float | None

    @property
    def error(self) -> float | None:
        return None if self.ours is None else self.paper.error(self.ours)

    @property
    def near(self) -> bool:
        return self.ours is not None and abs(self.error or 0.0) <= NEAR


@dataclass(frozen=True)
class Figure:
    """A figure of the paper. setup: what was put to the planner; why: it agrees, or does not."""

    number: str
    title: str
    setup: str
    rows: tuple[Row, ...]
    why: str


def page(figures: tuple[Figure, ...]) -> str:
    """docs/paper.md."""
    head = [
        "What *Mnemosyne*, later *Medha* (arXiv 2409.17264), reports, and what mnemoc predicts "
        "for the same setup on its shipped DGX H100: datasheets and named kernel measurements "
        "([dgx-h100.toml](../planner/clusters/dgx-h100.toml)), nothing fitted to the paper. "
        "F8–F10 are about traffic: there the engine runs on a virtual clock, on such a plan "
        "(`python -m benchmarks.traffic_runs` simulates them anew).",
        "An error is how far our value lies from what the paper says, as a share of it; what is "
        f"off by more than {percent(NEAR)} is in bold. What the paper, as far as we could read "
        "it, leaves open is marked as our choice. Where it says +16 % or −40 %, the tables hold "
        "1.16 or 0.6, and the error is that of the change. `python -m benchmarks.paper --write` "
        "writes this page.",
        _tally(figures),
    ]
    parts = ["# The paper, re-told", *map(_wrapped, head)]
    for figure in figures:
        table = _table(["", "paper", "mnemoc", "error"], [_cells(row) for row in figure.rows])
        parts += [f"## {figure.number}: {figure.title}", _wrapped(figure.setup), table]
        parts.append(_wrapped(figure.why))
    return "\n\n".join(parts) + "\n"


def summary(figures: tuple[Figure, ...]) -> str:
    """benchmarks/results/paper.md: every number in one table."""
    rows = [[figure.number, *_cells(row)] for figure in figures for row in figure.rows]
    table = _table(["", "", "paper", "mnemoc", "error"], rows)
    title = "# The paper's figures and ours"
    where = "Predicted, not measured; setups and reasons: [docs/paper.md](../../docs/paper.md)."
    return "\n\n".join([title, where, table, _tally(figures)]) + "\n"


def as_json(figures: tuple[Figure, ...], cluster: str) -> str:
    """benchmarks/results/paper.json."""
    rows = [
        {"figure": figure.number, "what": row.what, "unit": row.unit, "paper": row.paper.words}
        | {"ours": _rounded(row.ours), "error": _rounded(row.error)}
        for figure in figures
        for row in figure.rows
    ]
    return json.dumps({"cluster": cluster, "rows": rows}, indent=1) + "\n"


def _tally(figures: tuple[Figure, ...]) -> str:
    rows = [row for figure in figures for row in figure.rows if not row.paper.wordy]
    near = sum(row.near for row in rows)
    return f"{near} of {len(rows)} numbers agree within {percent(NEAR)}."


def _cells(row: Row) -> list[str]:
    unit = "" if row.unit == "1" else f" {row.unit}"
    paper = row.paper.words if row.paper.wordy else f"{row.paper.words}{unit}"
    ours = "no plan" if row.ours is None else f"{number(row.ours)}{unit}"
    error = "–" if row.error is None else "agrees" if row.error == 0 else percent(row.error, "+")
    return [row.what, paper, ours, error if row.near else f"**{error}**"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rounded(value: float | None) -> float | None:
    """To what is the same on every machine."""
    return None if value is None else float(f"{value:.4g}")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def percent(share: float, sign: str = "") -> str:
    """Two significant digits where it is small: "5.8 %", "−16 %"."""
    digits = 0 if abs(share) >= 0.095 else 1
    return f"{100 * share:{sign}.{digits}f} %".replace("-", "−")


def number(value: float) -> str:
    return f"{value:.3g}"
