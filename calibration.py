"""`mnemoc calibrate`: this machine → a cluster file whose figures were measured on it.

First the kernels that plans emit, on all cores at once; then the engine, running a small plan on one
core: its time between tokens beyond what the kernels explain is the overhead of an iteration.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import artifact, pipeline
from .artifact import Workload

if TYPE_CHECKING:
    from .planner import Cluster

SHAPE: Mapping[str, Any] = {
    "hidden": 512,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
    "ffn": 1408,
}
"""Of the model that is measured: small, but too large for the first caches."""

WORKLOAD = Workload(context=8192, ttft_s=1e6, tbt_s=1e6)
ONE_RANK = {"tp": 1, "spp": 1, "kvp": 1}

# Key of the cluster file, figure, unit.
KEYS = (
    ("peak.float32", "peak", "FLOP/s"),
    ("memory.bandwidth", "bandwidth", "B/s"),
    ("efficiency.matmul", "matmul", "1"),
    ("efficiency.attention_prefill", "attention_prefill", "1"),
    ("efficiency.attention_decode", "attention_decode", "1"),
    ("efficiency.memory", "memory", "1"),
    ("overhead.launch", "launch_s", "s"),
    ("overhead.iteration", "iteration_s", "s"),
    ("links.intra.latency", "latency_s", "s"),
    ("links.intra.bandwidth", "link", "B/s"),
    ("links.inter.latency", "latency_s", "s"),
    ("links.inter.bandwidth", "link", "B/s"),
)


def calibrate(
    out: Path | None, progress: pipeline.Progress = lambda message: None
) -> tuple[Path, dict[str, float]]:
    """Measure and write `out`, or the file that `--cluster local` reads. Returns path and figures."""
    from .ir.model import load_model
    from .planner import load_cluster, measured_path
    from .runtime.calibrate import measure
    from .runtime.init_model import Blueprint, init_model

    spec = dataclasses.replace(load_model("tiny-llama"), **SHAPE)

    def compile_for(cluster: Cluster, folder: Path) -> Path:
        planned = pipeline.plan_for(spec, cluster, WORKLOAD, pinned=ONE_RANK)
        pipeline.emit(planned, folder)
        return folder

    with tempfile.TemporaryDirectory(prefix="mnemoc-calibrate-") as scratch:
        work = Path(scratch)
        cores = len(os.sched_getaffinity(0))
        progress(f"measuring the kernels on {cores} cores at once")
        kernels = compile_for(load_cluster("local"), work / "kernels")
        figures = {**measure(kernels, cores), "iteration_s": 0.0}
        progress("measuring the engine")
        provisional = write(work / "local.toml", figures)
        weights = Blueprint({}, spec.tensors(), spec.dtype, spec.vocab, None, ())
        init_model(weights, work / "model", seed=0, max_shard_bytes=1 << 30)
        engine_plan = compile_for(provisional, work / "engine")
        figures["iteration_s"] = iteration_s(engine_plan, work / "model")
    path = out or measured_path()
    write(path, figures)
    return path, figures


def write(path: Path, figures: Mapping[str, float]) -> Cluster:
    """A cluster file for this machine; what was not measured stays as shipped."""
    from .planner import CALIBRATED, write_cluster

    source = f"{CALIBRATED} on this machine"
    numbers = {key: (figures[name], unit, source) for key, name, unit in KEYS}
    return write_cluster(path, name="local", device="CPU core", target="cpu", numbers=numbers)


def iteration_s(directory: Path, weights: Path, prompt: int = 512, tokens: int = 64) -> float:
    """What an iteration of one rank costs beyond its kernels, by the time between tokens."""
    from .runtime import Engine, Request, Sampling
    from .runtime.loader import ArtifactModules

    _, contents = artifact.load(directory)
    cost = ArtifactModules(directory, contents, ("cost",)).load("cost")
    explained: float = cost.crossing_s(T=1, R=1, QK=0, KV=0, KD=prompt + tokens // 2, X=0)
    with Engine.start(directory, weights) as engine:
        request = Request(tuple(i % 256 for i in range(prompt)), tokens, Sampling(ignore_eos=True))
        measured: float = statistics.median(engine.submit(request).result().tbt_s)
    return max(0.0, measured - explained)
