"""The sections' JSON → one Markdown page, and its place among the published results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runner import Figures

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Column:
    """title: its head; show: a row's text."""

    title: str
    show: Callable[[Figures], str]


def text(title: str, key: str) -> Column:
    return Column(title, lambda row: "" if row.get(key) is None else str(row[key]))


def number(title: str, key: str, scale: float = 1.0, digits: int = 4) -> Column:
    def show(row: Figures) -> str:
        value = row.get(key)
        return "" if value is None else f"{value * scale:.{digits}g}"

    return Column(title, show)


def share(title: str, key: str) -> Column:
    return Column(title, lambda row: "" if row.get(key) is None else f"{100 * row[key]:.1f} %")


def count(title: str, key: str) -> Column:
    return Column(title, lambda row: "" if row.get(key) is None else f"{row[key]:,}")


COLUMNS: Mapping[str, Sequence[Column]] = {
    "ceilings": (
        text("ceiling", "ceiling"),
        text("of", "of"),
        number("T/s", "rate", 1e-12),
        text("", "unit"),
    ),
    "compile": (count("processes", "processes"), number("s", "seconds"), text("", "note")),
    "correctness": (
        text("kernel", "kernel"),
        number("‖out − ref‖ / ‖ref‖", "relative_error", digits=2),
        number("lse, absolute", "lse_error", digits=2),
    ),
    "prefill": (
        *(text("heads", "heads"), count("chunk", "chunk"), count("after", "past")),
        *(text("K, V", "kv"), text("kernel", "kernel"), number("ms", "median_s", 1e3)),
        *(number("TFLOP/s", "flops_per_s", 1e-12), share("of peak", "share_of_peak")),
        *(number("µs a token", "s_per_token", 1e6), text("", "note")),
    ),
    "decode": (
        *(text("heads", "heads"), text("requests", "requests"), text("K, V", "kv")),
        *(text("kernel", "kernel"), number("µs", "median_s", 1e6)),
        *(
            number("TB/s", "bytes_per_s", 1e-12),
            share("of a copy", "share_of_copy"),
            text("", "note"),
        ),
    ),
    "rows": (
        *(text("kernel", "kernel"), text("rank of", "of"), count("rows", "rows")),
        *(number("µs", "median_s", 1e6), number("TB/s", "bytes_per_s", 1e-12)),
        share("of a copy", "share_of_copy"),
    ),
    "calibrate": (
        *(text("figure", "figure"), number("size", "size"), number("measured", "measured")),
        *(number("shipped", "shipped"), text("unit", "unit")),
    ),
    "stage": (
        *(text("plan", "plan"), text("", "batch"), count("rows", "rows"), count("after", "cached")),
        *(number("measured ms", "measured_s", 1e3), number("shipped ms", "shipped_s", 1e3)),
        *(share("error", "shipped_error"), number("calibrated ms", "calibrated_s", 1e3)),
        share("error", "calibrated_error"),
    ),
    "tiles": (
        *(text("kernel", "kernel"), text("of", "of"), text("tile", "tile")),
        *(number("µs", "median_s", 1e6), share("of the table's", "of_today"), text("", "note")),
    ),
}


def write(out: Path) -> Path:
    """OUT/report.md from the sections that are there."""
    found = _sections(out)
    lines = ["# Kernels and programs on a GPU, measured", ""]
    if found and _machine(found)["rehearsal"]:
        lines += ["A rehearsal in Triton's interpreter: its figures mean nothing.", ""]
    if found:
        lines += [f"- {_words(key)}: {value}" for key, value in _machine(found).items()]
        lines += ["", *summary(found)]
    for name, body in found.items():
        lines += ["", f"## {body['title']}", ""]
        if body["missing"]:
            lines += [f"Not reached in its time: {'; '.join(body['missing'])}.", ""]
        lines += table(COLUMNS[name], [row for rows in body["cases"].values() for row in rows])
    path = out / "report.md"
    path.write_text("\n".join([*lines, ""]))
    return path


def publish(out: Path, into: Path) -> Path:
    """gpu-<device>.md and .json in the folder `into`, from what is in OUT."""
    into.mkdir(exist_ok=True)
    found = _sections(out)
    slug = re.sub(r"[^a-z0-9]+", "-", str(_machine(found)["device"]).lower()).strip("-")
    path = into / f"gpu-{slug}.md"
    path.write_text(write(out).read_text())
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return path


def table(columns: Sequence[Column], rows: Sequence[Figures]) -> list[str]:
    """Markdown; a row that failed says why in its last column."""
    heads = [column.title for column in columns]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = [column.show(row) for column in columns]
        if "error" in row:
            cells[-1] = f"{cells[-1]} **{row['error']}**".strip()
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(found: Mapping[str, Any]) -> list[str]:
    """What the figures come to, each by the rows that it is of."""
    return [
        f"- {line}"
        for section, tell in _SUMMARIES.items()
        if section in found
        for line in tell([row for rows in found[section]["cases"].values() for row in rows])
    ]


def _errors(rows: Sequence[Figures]) -> list[str]:
    wrong = [row for row in rows if "error" in row]
    return [f"{len(rows) - len(wrong)} of {len(rows)} checks against float64 hold"]


def _prefill(rows: Sequence[Figures]) -> list[str]:
    ours = [row for row in rows if row.get("kernel") == "ours" and "flops_per_s" in row]
    lines = []
    if ours:
        best = max(ours, key=lambda row: float(row["flops_per_s"]))
        lines.append(
            f"prefill reaches {best['flops_per_s'] / 1e12:.4g} TFLOP/s ({best['heads']}, "
            f"{best['chunk']:,} after {best['past']:,}, K and V in {best['kv']})"
        )
    slower = _beaten(rows, ("heads", "chunk", "past", "kv"), "flops_per_s")
    lines.append(f"prefill is behind the best baseline in {slower}")
    by_size = {
        (r["heads"], r["past"], r["chunk"]): r["s_per_token"]
        for r in ours
        if r["kv"] != "float8_e4m3fn"
    }
    for (heads, past, chunk), small_s in by_size.items():
        large_s = by_size.get((heads, past, 2048))
        if chunk == 32 and large_s:
            lines.append(
                f"a token of a 32-token chunk after {past:,} takes {small_s / large_s:.3f} times what "
                f"one of a 2,048-token chunk takes ({heads})"
            )
    return lines


def _decode(rows: Sequence[Figures]) -> list[str]:
    ours = [row for row in rows if row.get("kernel") == "ours" and "bytes_per_s" in row]
    lines = [
        f"one request of {row['requests'].removeprefix('1 × ')} decodes at "
        f"{row['bytes_per_s'] / 1e12:.3g} TB/s, {_percent(row['share_of_copy'])} of a copy ({row['heads']})"
        for row in ours
        if row["requests"].startswith("1 × ")
        and row["kv"] != "float8_e4m3fn"
        and "+" not in row["requests"]
    ]
    return [
        *lines,
        f"decode is behind the best baseline in {_beaten(rows, ('heads', 'requests', 'kv'), 'bytes_per_s')}",
    ]


def _rows(rows: Sequence[Figures]) -> list[str]:
    most = max((row["rows"] for row in rows if "rows" in row), default=0)
    worst: dict[str, float] = {}
    for row in rows:
        if row.get("rows") == most and row.get("share_of_copy") is not None:
            worst[row["kernel"]] = min(worst.get(row["kernel"], 9.0), row["share_of_copy"])
    listed = ", ".join(f"{kernel} {_percent(least)}" for kernel, least in worst.items())
    return [f"{most:,} rows, the least share of a copy: {listed}"] if worst else []


def _stage(rows: Sequence[Figures]) -> list[str]:
    lines = []
    for key, what in (("shipped_error", "shipped"), ("calibrated_error", "calibrated")):
        off = sorted(abs(row[key]) for row in rows if row.get(key) is not None)
        if off:
            middle = off[len(off) // 2]
            lines.append(
                f"cost.py of the {what} cluster file is off by {_percent(middle)} (median) and at worst "
                f"{_percent(off[-1])} over {len(off)} micro-batches"
            )
    return lines


_SUMMARIES: Mapping[str, Callable[[Sequence[Figures]], list[str]]] = {
    "correctness": _errors,
    "prefill": _prefill,
    "decode": _decode,
    "rows": _rows,
    "stage": _stage,
}


def _beaten(rows: Sequence[Figures], keys: Sequence[str], rate: str) -> str:
    """In how many cases a baseline is quicker than ours, and which the worst is."""
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if rate in row and row.get("kernel"):
            cases.setdefault(tuple(row[key] for key in keys), {})[row["kernel"]] = row[rate]
    ratios = {
        case: rates["ours"] / max(value for name, value in rates.items() if name != "ours")
        for case, rates in cases.items()
        if "ours" in rates and len(rates) > 1
    }
    behind = {case: ratio for case, ratio in ratios.items() if ratio < 1}
    if not behind:
        return f"none of {len(ratios)} cases"
    worst = min(behind, key=lambda case: behind[case])
    named = ", ".join(map(str, worst))
    return f"{len(behind)} of {len(ratios)} cases, at worst at {_percent(behind[worst])} of it ({named})"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.1f} %"


def _sections(out: Path) -> dict[str, Any]:
    """Bodies of the sections' files, in the order of the tables."""
    paths = {name: out / f"{name}.json" for name in COLUMNS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def _machine(found: Mapping[str, Any]) -> Mapping[str, Any]:
    machine: Mapping[str, Any] = next(iter(found.values()))["machine"]
    return machine


def _words(key: str) -> str:
    return key.replace("_", " ")
