"""Reasons: what else was possible, why this plan, and where the figures come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...artifact import Plan, Workload
from ...units import format_bytes, format_duration


@dataclass(frozen=True)
class Choice:
    """A layout with what it gives; broken: which promises it breaks."""

    layout: str
    gpus: str
    ttft: str
    tbt: str
    reason: str
    broken: tuple[str, ...] = ()
    chosen: bool = False


def alternatives(workload: Workload, plan: Plan) -> tuple[Choice, ...]:
    """The chosen layout first, then the best others."""
    said = plan.predicted
    rows = [
        Choice(
            str(plan.layout),
            f"{plan.gpus:,}",
            format_duration(said.ttft_s),
            format_duration(said.tbt_s),
            "chosen",
            chosen=True,
        )
    ]
    for other in plan.alternatives:
        known = other.ttft_s > 0
        limits = (
            ("ttft", known and other.ttft_s > workload.ttft_s),
            ("tbt", other.tbt_s > workload.tbt_s),
        )
        rows.append(
            Choice(
                str(other.layout),
                f"{other.gpus:,}",
                format_duration(other.ttft_s) if known else "–",
                format_duration(other.tbt_s),
                other.reason,
                tuple(name for name, breaks in limits if breaks),
            )
        )
    return tuple(rows)


def why(plan: Plan) -> tuple[str, ...]:
    """What binds and what next, in sentences, and what the solver proved."""
    proven = plan.optimality
    return (
        *plan.notes,
        f"Proven optimal in {proven.minimised} to a gap of {proven.gap:.2%} "
        f"(objective {proven.objective:.6g}, bound {proven.bound:.6g}).",
    )


@dataclass(frozen=True)
class Figure:
    """A number of the cluster file: key, value with unit, the kind of its source, and the source."""

    key: str
    value: str
    kind: str
    source: str


@dataclass(frozen=True)
class Sources:
    sentence: str
    figures: tuple[Figure, ...]


def sources(cluster: Mapping[str, Any]) -> Sources:
    """Every number and every curve of the cluster, with its source."""
    figures = (
        *(
            Figure(key, _quantity(entry["value"], entry["unit"]), *_kind(entry["source"]))
            for key, entry in cluster["numbers"].items()
        ),
        *(
            Figure(f"efficiency.{name}", _curve(curve), *_kind(curve["source"]))
            for name, curve in cluster["curves"].items()
        ),
    )
    kinds = Counter(figure.kind for figure in figures if figure.kind)
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    return Sources(f"{len(figures)} figures of {cluster['name']}: {counted}.", figures)


def _curve(curve: Mapping[str, Any]) -> str:
    """From the smallest point to the largest, and what the curve comes to beyond."""
    if not curve["points"]:
        return f"{curve['full']:.0%}"
    points = [
        f"{share:.0%} at {_quantity(size, curve['unit'])}"
        for size, share in (curve["points"][:1] + curve["points"][-1:])
    ]
    return ", ".join((*dict.fromkeys(points), f"at best {curve['full']:.0%}"))


def _kind(source: str) -> tuple[str, str]:
    """A source's kind is the word before its first colon, where there is one."""
    kind, colon, rest = source.partition(": ")
    if colon and kind.isalpha():
        return kind, rest
    return "", source


def _quantity(value: float, unit: str) -> str:
    """A base-unit number as people write it."""
    if unit == "s":
        return format_duration(value) if value else "0 s"
    if unit == "B":
        return format_bytes(value)
    if unit in ("B/s", "FLOP/s"):
        return f"{_scaled(value)}{unit}"
    if unit == "1":
        return f"{value:.0%}"
    return f"{value:,.4g} {unit}"


def _scaled(value: float) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g} "
