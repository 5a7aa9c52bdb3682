"""The promise: what must hold of a workload before anything is planned for it."""

from __future__ import annotations

import math

from ..artifact import Workload
from ..errors import BadInput
from ..ir.model import ModelSpec

OBJECTIVES = ("gpus", "ttft", "throughput")


def check_workload(workload: Workload) -> Workload:
    """The workload itself, or BadInput saying which promise makes no sense."""
    for name in ("context", "output_tokens", "concurrency"):
        value = getattr(workload, name)
        if value < 1:
            raise BadInput(f"{name} must be at least 1", got=value)
    for name in ("ttft_s", "tbt_s"):
        value = getattr(workload, name)
        if not math.isfinite(value) or value <= 0:
            raise BadInput(f"{name} must be a positive duration", got=value)
    if workload.objective not in OBJECTIVES:
        raise BadInput(
            "unknown objective", got=workload.objective, do=f"one of {', '.join(OBJECTIVES)}"
        )
    return workload


def total_tokens(workload: Workload) -> int:
    """Tokens that one request may hold: its prompt and its output."""
    return workload.context + workload.output_tokens


def workload_notes(spec: ModelSpec, workload: Workload) -> tuple[str, ...]:
    """What is worth saying about a promise that can be kept in time but not in meaning."""
    if total_tokens(workload) <= spec.max_position:
        return ()
    return (
        f"{spec.name} was trained for {spec.max_position:,} positions; "
        f"{total_tokens(workload):,} need RoPE scaling to give useful answers",
    )
