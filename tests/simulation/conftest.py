"""Plans by hand and an invented cost function: a simulation needs no model, no weights and no planner."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from mnemoc.artifact import (
    ChunkRule,
    Manifest,
    Memory,
    Optimality,
    Plan,
    Prediction,
    Stage,
    Workload,
)
from mnemoc.layout import Layout

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn": 96,
    "vocab": 320,
    "eos": [257],
}
NUMBERS = {
    "peak.float32": {"value": 1e12},
    "memory.bandwidth": {"value": 1e10},
    "devices_per_node": {"value": 8},
}

Make = Callable[..., Any]


def make_manifest(spp: int = 2, kvp: int = 1, ffn: str = "repeated", **changes: Any) -> Manifest:
    """changes: fields of the plan; `cluster` of the manifest."""
    cluster = changes.pop("cluster", {"numbers": NUMBERS})
    stages = tuple(Stage(f"stage_{i}", i, 1) for i in range(spp))
    fields: dict[str, Any] = {
        "target": "cuda:sm_80",
        "dtype": "float32",
        "layout": Layout(1, spp, kvp, ffn),
        "stages": stages,
        "chunks": (ChunkRule(0, 1000, 100, 1, 0.0), ChunkRule(1000, 100_000, 50, 1, 0.0)),
        "page_size": 16,
        "num_pages": 4000,
        "stripe_tokens": 160 if kvp > 1 else 100_000,
        "max_batch": 64,
        "max_rows": 4096,
        "predicted": Prediction(1.0, 1.0, 1.0, {}, {}),
        "memory": Memory(0, 0, 0, 0, 0, 0, 0, ""),
        "optimality": Optimality("gpus", 1.0, 1.0, 0.0),
        "binding": "none",
        "alternatives": (),
    }
    plan = Plan(**(fields | changes))
    return Manifest(MODEL, cluster, Workload(20_000, ttft_s=100.0, tbt_s=0.1), plan)


def make_cost(spp: int = 2, *, overlaps: bool = True, swap_s: float = math.inf) -> Any:
    """A stage takes 1 ms, and 1 for each 100 rows and each 100,000 pairs or keys; a hop takes 0.5 ms."""

    def blocks_s(*counts: int) -> tuple[float, float, float, float, float]:
        rows, _, pairs, _, keys, _ = counts
        return 1e-3, 0.0, rows * 1e-5 + (pairs + keys) * 1e-8, 0.0, 5e-4

    def stage_s(stage: int, *counts: int) -> float:
        every, _, layer, _, hop = blocks_s(*counts)
        return every + layer + (hop if stage < spp - 1 else 0.0)

    def crossing_s(*counts: int) -> float:
        return sum(stage_s(stage, *counts) for stage in range(spp))

    def pace_s(*counts: int) -> float:
        inside = 5e-4 if overlaps and spp > 1 else 0.0
        return stage_s(0, *counts) - inside

    return SimpleNamespace(
        STAGES=tuple((1, i == 0, i == spp - 1, i < spp - 1) for i in range(spp)),
        blocks_s=blocks_s,
        stage_s=stage_s,
        crossing_s=crossing_s,
        pace_s=pace_s,
        swap_s=lambda pages: swap_s * pages,
    )


@pytest.fixture
def manifest() -> Make:
    return make_manifest


@pytest.fixture
def cost() -> Make:
    return make_cost
