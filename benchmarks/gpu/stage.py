"""Whole stages: one rank of a real plan, with random weights, stepped through its own emitted program.

Each micro-batch's time is held against cost.py of the artifact, twice: priced by the shipped cluster file,
and by the one that the section `calibrate` wrote of this very device. Messages are left out of both sides.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mnemoc.artifact import Plan, Workload
from mnemoc.planner import Cluster, load_cluster
from mnemoc.runtime.loader import ArtifactModules
from mnemoc.runtime.measuring.replay import Replay
from mnemoc.runtime.measuring.walk import Asked, MicroBatch, Walk

from .calibrate import CLUSTER_FILE
from .plans import QUESTIONS, cluster_of, cost_source, emit, kept
from .runner import Case, Figures, Section, Setup

CHUNKS = (32, 256, 1024)
"""Beside the plan's own: what a micro-batch may shrink to, and what it could be."""
PLACES = (0.0, 0.05, 0.25, 0.5, 1.0)
"""Shares of the context that are cached before a chunk."""


def cases(setup: Setup) -> Sequence[Case]:
    setup.drop_pool()
    return [Case(name, _case(setup, name)) for name in setup.sizes.plans]


def _case(setup: Setup, name: str) -> Callable[[], list[Figures]]:
    return lambda: _replayed(setup, name)


def _replayed(setup: Setup, name: str) -> list[Figures]:
    device = setup.device
    target = "cpu" if device.rehearsal else device.target
    shipped = cluster_of(device.machine.device) or load_cluster(QUESTIONS[name].cluster)
    with tempfile.TemporaryDirectory(prefix="mnemoc-stage-") as scratch:
        folder = emit(name, target, shipped, Path(scratch) / name, setup.tiles)
        held = kept(name)
        asked = Asked(
            QUESTIONS[name].rank,
            prompt=held.workload.context,
            decodes=held.workload.concurrency,
            steps=1,
        )
        with Replay.open(folder, asked) as replay:
            calibrated = _priced(setup, name, replay.walk)
            rows = [
                _measured(name, replay, batch, calibrated)
                for batch in micro_batches(held.plan, held.workload)
            ]
        del replay
        device.release()  # weights and pages of one plan make room for the next one's
    return rows


def micro_batches(plan: Plan, workload: Workload) -> list[MicroBatch]:
    """Chunks of several sizes along the context, and decodes of one request and of all that are promised."""
    found, context = [], workload.context
    for place in PLACES:
        cached = int(place * context) // plan.page_size * plan.page_size
        for rows in sorted({plan.chunk_at(cached), *CHUNKS}):
            cut = min(cached, context - rows)
            if cut >= 0 and MicroBatch("prefill", rows, cut) not in found:
                found.append(MicroBatch("prefill", rows, cut))
    for cached in sorted({context // 16, context}):
        for rows in sorted({1, workload.concurrency}):
            found.append(MicroBatch("decode", rows, cached))
    return found


def _priced(setup: Setup, name: str, walk: Walk) -> Walk | None:
    """The walk, priced by what was measured on this device; None where it was not."""
    path = setup.out / CLUSTER_FILE
    if not path.exists():
        return None
    cluster: Cluster = load_cluster(str(path))
    contents = {"cost.py": cost_source(name, cluster).encode()}
    cost = ArtifactModules(Path("calibrated"), contents, ["cost.py"]).load("cost")
    return dataclasses.replace(walk, cost=cost)


def _measured(name: str, replay: Replay, batch: MicroBatch, calibrated: Walk | None) -> Figures:
    found = replay.measure(batch)
    row: Figures = {
        "plan": f"{name}, {replay.plan.layout}, stage {replay.walk.stage}",
        "batch": batch.kind,
        "rows": batch.rows,
        "cached": batch.cached,
        "measured_s": found.measured_s,
        "shipped_s": found.predicted_s,
        "shipped_error": found.error,
    }
    if calibrated is not None:
        predicted_s, _ = calibrated.predict(batch)
        row |= {
            "calibrated_s": predicted_s,
            "calibrated_error": predicted_s / found.measured_s - 1,
        }
    return row


SECTION = Section("stage", "Whole stages against cost.py", cases)
