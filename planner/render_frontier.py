"""The frontier as a table: the least TTFT for so many devices and such a TBT promise."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..alternatives import Frontier
from ..artifact import Workload
from ..layout import Layout
from ..units import format_duration

_ROWS = 12
_COLUMNS = 5
_KEPT, _CHOSEN = "✓", "●"


def render_frontier(frontier: Frontier, workload: Workload, chosen: Layout | None = None) -> Table:
    """Fits in 80 columns; marks, not colours alone, say what keeps the promise and what was chosen."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("\ndevices", justify="right")
    levels = _nearest(frontier.tbt_s, workload.tbt_s)
    for tbt_s in levels:
        name = "promised  " if tbt_s == workload.tbt_s else "TBT  "
        table.add_column(f"{name}\n{format_duration(tbt_s)}  ", justify="right")
    for gpus in _few(frontier, chosen):
        cells = [_cell(frontier, workload, gpus, tbt_s, chosen) for tbt_s in levels]
        table.add_row(str(gpus), *cells)
    table.title = "least TTFT, by the most devices and the TBT promise"
    table.title_style, table.title_justify = "bold", "left"
    points, shown = len(frontier.points), f"{len(levels)} of {len(frontier.tbt_s)} TBT promises"
    mark = f" {_CHOSEN} this plan;" if chosen is not None else ""
    table.caption = (
        f"{_KEPT} keeps both promises;{mark} – not possible. {points} points, each the exact optimum, "
        f"{shown}; all in --json."
    )
    table.caption_justify = "left"
    return table


def _nearest(levels: tuple[float, ...], asked: float) -> tuple[float, ...]:
    """Neighbouring levels about the one that was asked."""
    first = levels.index(asked) - _COLUMNS // 2
    first = max(0, min(first, len(levels) - _COLUMNS))
    return levels[first : first + _COLUMNS]


def _few(frontier: Frontier, chosen: Layout | None) -> list[int]:
    """At most about _ROWS numbers of devices, each about as much above the last; and the plan's own."""
    every = sorted({point.gpus for point in frontier.points})
    if not every:
        return []
    ratio = max(1.0, every[-1] / every[0]) ** (1 / (_ROWS - 1))
    kept = {every[-1]} | ({chosen.gpus} if chosen is not None else set())
    bar = 0.0
    for gpus in every:
        if gpus >= bar:
            kept.add(gpus)
            bar = gpus * ratio
    return sorted(kept)


def _cell(
    frontier: Frontier, workload: Workload, gpus: int, tbt_s: float, chosen: Layout | None
) -> Text:
    within = [p for p in frontier.points if p.gpus <= gpus and p.tbt_s <= tbt_s]
    if not within:
        return Text("–  ", style="dim")
    best = min(within, key=lambda point: point.ttft_s)
    kept = best.ttft_s <= workload.ttft_s and tbt_s <= workload.tbt_s
    here = best.layout == chosen and gpus == best.gpus and tbt_s == workload.tbt_s
    mark = _CHOSEN if here else _KEPT if kept else " "
    return Text(f"{_short(best.ttft_s)} {mark}", style="bold green" if kept else "")


def _short(seconds: float) -> str:
    """A duration in at most eight characters."""
    if seconds < 600:
        return format_duration(seconds)
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
