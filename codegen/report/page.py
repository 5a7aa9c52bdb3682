"""The page: its head and the sequence of its sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...artifact import Plan, Workload
from ...ir.graph import Module
from ...timeline import Timeline
from ...units import format_count
from ...wording import dtypes
from ..templating import render
from .course import chunks, pipeline
from .fill import memory, promise
from .frontier import edge
from .reasons import alternatives, sources, why

SECTIONS = (
    "promise",
    "chunks",
    "pipeline",
    "memory",
    "frontier",
    "alternatives",
    "why",
    "sources",
)
_SECTION_TITLES = {
    "chunks": "Chunks over the context",
    "pipeline": "The pipeline",
    "memory": "Memory of a rank",
    "frontier": "The frontier",
    "alternatives": "What else was possible",
    "why": "Why this plan",
    "sources": "Where the figures come from",
}
_OBJECTIVES = {"gpus": "fewest GPUs", "ttft": "least TTFT", "throughput": "most throughput"}


@dataclass(frozen=True)
class Report:
    """What the page is made from. `cluster`: as in the manifest; `planned`: the module per stage."""

    model: str
    cluster: Mapping[str, Any]
    workload: Workload
    plan: Plan
    planned: Module
    timeline: Timeline


def render_report(report: Report) -> str:
    """The page's HTML."""
    plan, workload = report.plan, report.workload
    device = "worker" if plan.target == "cpu" else "GPU"
    layout = plan.layout
    return render(
        "report/page.html.j2",
        model=report.model,
        cluster=report.cluster["name"],
        context=format_count(workload.context),
        facts=[
            ("context", f"{workload.context:,} tokens"),
            ("output", f"{workload.output_tokens:,} tokens"),
            ("at once", f"{workload.concurrency:,}"),
            ("objective", _OBJECTIVES.get(workload.objective, workload.objective)),
            ("code", f"{dtypes(plan.dtype, plan.precision)}, {plan.target}"),
            ("device", report.cluster["device"]),
        ],
        ranks=f"{plan.gpus:,} {device}{'s' if plan.gpus > 1 else ''}",
        axes=[
            (layout.tp, "tensor", "heads and columns"),
            (layout.spp, "pipeline", "stages of layers"),
            (
                layout.kvp,
                "sequence",
                f"groups of KV cache{', FFN over all' if layout.helix else ''}",
            ),
        ],
        sections=[name for name in SECTIONS if name != "alternatives" or plan.alternatives],
        titles=_SECTION_TITLES,
        promise=promise(workload, plan),
        chunks=chunks(workload, plan, report.timeline),
        pipeline=pipeline(plan, report.timeline),
        memory=memory(workload, plan, report.planned),
        edge=edge(workload, plan),
        alternatives=alternatives(workload, plan),
        why=why(plan),
        sources=sources(report.cluster),
    )
