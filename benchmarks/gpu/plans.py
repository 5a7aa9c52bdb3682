"""The plans whose stages are replayed: made here by `--prepare`, carried as JSON, emitted where they run.

Proving a plan needs a solver that a bare machine lacks; emitting its programs and pricing it does not. So
plans/<name>.json holds what the planner decided, and kernels, program and cost function are of today's code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mnemoc import pipeline
from mnemoc.artifact import Manifest, Plan, Workload
from mnemoc.calibration_gpu import SHIPPED
from mnemoc.codec import from_json, to_json
from mnemoc.codegen.cost import render_cost
from mnemoc.codegen.emit import kernel_spec
from mnemoc.codegen.kernels import render_kernels
from mnemoc.codegen.schedule import render_schedule
from mnemoc.codegen.tiles import Tiles
from mnemoc.folder import write_artifact
from mnemoc.ir.model import load_model
from mnemoc.planner import Cluster, StageFormulas, load_cluster
from mnemoc.planner.price import Pricer

FOLDER = Path(__file__).parent / "plans"


@dataclass(frozen=True)
class Question:
    """What is planned. rank: the one that is replayed."""

    model: str
    cluster: str
    workload: Workload
    layout: Mapping[str, int | str]
    rank: int


QUESTIONS: Mapping[str, Question] = {
    "llama-3-8b": Question(
        "llama-3-8b",
        "dgx-h100",
        Workload(65536, ttft_s=60, tbt_s=0.05, output_tokens=1024, concurrency=4),
        {"tp": 1, "spp": 1, "kvp": 1},
        rank=0,
    ),
    "llama-3-70b": Question(
        "llama-3-70b",
        "dgx-h100",
        Workload(1_000_000, ttft_s=600, tbt_s=0.05, output_tokens=1024, concurrency=2),
        {"tp": 8, "spp": 4, "kvp": 1},
        rank=8,
    ),
    "tiny-llama": Question(
        "tiny-llama",
        "local",
        Workload(512, ttft_s=60, tbt_s=1, output_tokens=16, concurrency=2),
        {"tp": 1, "spp": 2, "kvp": 1},
        rank=1,
    ),
}


@dataclass(frozen=True)
class Kept:
    """A plan as it is carried."""

    workload: Workload
    plan: Plan


def prepare() -> None:
    """Plan all of them and write plans/*.json."""
    FOLDER.mkdir(exist_ok=True)
    for name, asked in QUESTIONS.items():
        degrees = [asked.layout[axis] for axis in ("tp", "spp", "kvp")]
        gpus = 1
        for degree in degrees:
            gpus *= int(degree)
        made = pipeline.plan(
            asked.model, asked.cluster, asked.workload, gpus=gpus, pinned=asked.layout
        )
        # what else could be had is of no use to a replay
        plan = dataclasses.replace(made.plan, alternatives=(), marginals=(), notes=())
        body = to_json(Kept(made.workload, plan))
        (FOLDER / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")


def kept(name: str) -> Kept:
    path = FOLDER / f"{name}.json"
    return from_json(Kept, json.loads(path.read_text()), str(path))


def cluster_of(device: str) -> Cluster | None:
    """The shipped cluster of such devices; None if there is none."""
    return next((load_cluster(name) for part, name in SHIPPED.items() if part in device), None)


def emit(name: str, target: str, cluster: Cluster, out: Path, tiles: Tiles | None = None) -> Path:
    """The plan's artifact for a target, priced by a cluster; kernels are not compiled ahead of time.

    tiles: in place of the architecture's own
    """
    asked, held = QUESTIONS[name], kept(name)
    spec = load_model(asked.model)
    plan = dataclasses.replace(held.plan, target=target)
    formulas = _formulas(name, cluster)
    planned = pipeline.Planned(spec, cluster, held.workload, plan, formulas, None)
    _, module = pipeline.apply(planned)
    texts = {
        **render_kernels(kernel_spec(spec, plan), tiles),
        **render_schedule(module, plan),
        "cost.py": _cost(formulas, plan),
    }
    manifest = Manifest(to_json(spec), cluster.describe(), held.workload, plan)
    files = {path: text.encode() for path, text in texts.items()}
    write_artifact(out, manifest, files)
    return out


def cost_source(name: str, cluster: Cluster) -> str:
    """cost.py of the plan, priced by another cluster."""
    return _cost(_formulas(name, cluster), kept(name).plan)


def _formulas(name: str, cluster: Cluster) -> StageFormulas:
    held = kept(name)
    spec, plan = load_model(QUESTIONS[name].model), held.plan
    pricer = Pricer(spec, cluster, plan.dtype, held.workload, plan.precision)
    return pricer.formulas(plan.layout)


def _cost(formulas: StageFormulas, plan: Plan) -> str:
    parts = {block: formula.parts for block, formula in formulas.items()}
    host_s = {block: formula.host_s for block, formula in formulas.items()}
    return render_cost(parts, host_s, plan)
