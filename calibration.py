"""`mnemoc calibrate`: this machine → a cluster file whose figures were measured on it.

First the kernels that plans emit, by size, on one core and on all at once; what a whole layer of one row
takes beyond them is the cost of its launches, what one of many rows takes beyond both is that of its
products. Then the engine, running a small plan on one core: its time between tokens beyond what all this
explains is the overhead of an iteration, and of each request in it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pipeline
from .artifact import Workload
from .folder import load_artifact

if TYPE_CHECKING:
    from .console import Progress
    from .ir.model import ModelSpec
    from .planner import Cluster
    from .runtime.measuring.calibrate import Figures
    from .runtime.measuring.probes import Points

    Figure = tuple[float | Sequence[tuple[float, float]], str, str]

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

CROWD = 8
"""Requests at once, from which the cost of each is found."""

ROUNDS, QUICK_ROUNDS = 8, 3
"""Of the engine: some two seconds each. For one second a machine may be a third quicker or slower than for
the next.
"""

LINKS = ("links.intra", "links.inter")

DISTURBED = 0.05
"""Of a machine's cores in the hands of others, from which on figures are not to be trusted."""


def calibrate(
    out: Path | None, progress: Progress | None = None, *, quick: bool = False
) -> tuple[Path, Cluster]:
    """Measure and write `out`, or the file that `--cluster local` reads.

    quick: fewer sizes, in a third of the time.
    """
    from .ir.model import load_model
    from .planner import load_cluster, measured_path
    from .runtime.init_model import Blueprint, init_model
    from .runtime.measuring.calibrate import measure

    spec = dataclasses.replace(load_model("tiny-llama"), **SHAPE)
    say = Steps(progress)
    with tempfile.TemporaryDirectory(prefix="mnemoc-calibrate-") as scratch:
        work = Path(scratch)
        cores = len(os.sched_getaffinity(0))
        say.at("measuring the kernels", 0.0)
        _compile(spec, load_cluster("local"), work / "kernels")
        measured = measure(
            work / "kernels", cores, quick, lambda f: say.at("measuring the kernels", f * _KERNELS)
        )
        say.at("measuring the engine", _KERNELS)
        source = source_of(measured.others)
        figures = _figures(measured, source)
        free = _write(work / "free.toml", figures)
        figures["overhead.launch"] = (_launch_s(spec, free, measured.layer_s), "s", source)
        launched = _write(work / "launched.toml", figures)
        products = _products(spec, launched, measured)
        figures["efficiency.matmul"] = (rising(products, measured.peak_flops), "rows", source)
        provisional = _write(work / "local.toml", figures)
        weights = Blueprint({}, spec.tensors(), spec.dtype, spec.vocab, None, ())
        init_model(weights, work / "model", seed=0, max_shard_bytes=1 << 30)
        _compile(spec, provisional, work / "engine")
        iteration_s, row_s = beside_kernels(
            work / "engine", work / "model", QUICK_ROUNDS if quick else ROUNDS
        )
        figures["overhead.iteration"] = (iteration_s, "s", source)
        figures["overhead.row"] = (row_s, "s", source)
    path = out or measured_path()
    return path, _write(path, figures)


_KERNELS = 0.65  # of the whole time


class Steps:
    """Progress with the time that is left, as far as what is done lets us tell."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.started = progress, time.monotonic()

    def at(self, what: str, fraction: float) -> None:
        if self.progress is not None:
            spent_s = time.monotonic() - self.started
            eta_s = spent_s * (1 - fraction) / fraction if fraction > 0.05 else None
            self.progress(what, fraction, eta_s)


def _compile(spec: ModelSpec, cluster: Cluster, folder: Path) -> None:
    from .planner import WhatIf

    question = WhatIf(spec, cluster, WORKLOAD, pinned=ONE_RANK)
    pipeline.emit(pipeline.plan_for(question), folder)


def _write(path: Path, figures: Mapping[str, Figure]) -> Cluster:
    """A cluster file for this machine; what was not measured stays as shipped."""
    from .planner import write_cluster

    return write_cluster(path, name="local", device="CPU core", target="cpu", figures=figures)


def _figures(measured: Figures, source: str) -> dict[str, Figure]:
    """Keys of the cluster file from what was measured; what overheads explain is still zero."""
    peak, stream = measured.peak_flops, measured.bandwidth
    points: dict[str, tuple[Points, float, str]] = {
        "matmul": (measured.matmul, peak, "rows"),
        "attention_prefill": (measured.attention_prefill, peak, "rows"),
        "attention_decode": (measured.attention_decode, stream, "B"),
        "memory": (measured.memory, stream, "B"),
    }
    figures: dict[str, Figure] = {
        "peak.float32": (peak, "FLOP/s", source),
        "memory.bandwidth": (stream, "B/s", source),
        "memory.shared_bandwidth": (measured.shared_bandwidth, "B/s", source),
        **{
            f"efficiency.{name}": (rising(rates, most), unit, source)
            for name, (rates, most, unit) in points.items()
        },
        "overhead.launch": (0.0, "s", source),
        "overhead.iteration": (0.0, "s", source),
    }
    for where in LINKS:
        figures |= way_figures(where, measured.link, source)
    return figures | way_figures("host", measured.host, source)


def way_figures(where: str, rates: Points, source: str) -> dict[str, Figure]:
    """Bandwidth and latency of a way that bytes take: a curve again, as people write it for what is sent."""
    from .planner import through

    best = max(rate for _, rate in rates)
    curve = through(rising(rates, best), "B", source)
    bandwidth = best * curve.full
    return {
        f"{where}.bandwidth": (bandwidth, "B/s", source),
        f"{where}.latency": (curve.half / bandwidth, "s", source),
    }


def source_of(others: float) -> str:
    """Where figures come from. others: cores that others used; where they weigh, figures are no better than
    assumed ones.
    """
    from .planner import CALIBRATED

    if others <= DISTURBED * (os.cpu_count() or 1):
        return CALIBRATED
    return f"disturbed: {CALIBRATED}, of which others used {others:.1f} cores meanwhile"


def rising(points: Sequence[tuple[float, float]], best: float) -> list[tuple[float, float]]:
    """Rates as shares of the best, where neighbours that fall are averaged until none does.

    What falls as size grows is noise, or caches that a longer sweep leaves: the mean is the honest figure.
    """
    runs: list[list[float]] = []
    for _, rate in points:
        runs.append([rate / best])
        while len(runs) > 1 and statistics.fmean(runs[-2]) > statistics.fmean(runs[-1]):
            fallen = runs.pop()
            runs[-1] += fallen
    shares = [min(1.0, statistics.fmean(run)) for run in runs for _ in run]
    return [(size, share) for (size, _), share in zip(points, shares, strict=True)]


def _launch_s(spec: ModelSpec, cluster: Cluster, layer_s: float) -> float:
    """Per op, what a layer of one row takes beyond what the curves explain."""
    from .planner import one_layer
    from .runtime.measuring.probes import LAYER_TOKENS

    explained_s, launches = one_layer(spec, cluster, cached=LAYER_TOKENS)
    return max(0.0, layer_s - explained_s) / launches


def _products(spec: ModelSpec, cluster: Cluster, measured: Figures) -> Points:
    """FLOP/s of a layer's products among all else that it does, by rows: what a layer takes beyond what is
    explained is theirs. Alone they find their inputs in the first caches, and memory that is theirs already.
    """
    from .planner import whole_layers

    weights = (s for name, s in spec.tensors().items() if ".layers.0." in name and len(s) == 2)
    row_flops = 2 * sum(map(math.prod, weights))
    explained = whole_layers(spec, cluster, [rows for rows, _ in measured.matmul])
    found = []
    for (rows, rate), (_, layer_s), explained_s in zip(
        measured.matmul, measured.layers_s, explained, strict=True
    ):
        alone_s = rows * row_flops / rate
        found.append((rows, rows * row_flops / max(alone_s / 2, alone_s + layer_s - explained_s)))
    return found


def beside_kernels(
    directory: Path, weights: Path, rounds: int, prompt: int = 256, tokens: int = 48
) -> tuple[float, float]:
    """What an iteration of one rank costs beyond its kernels, in seconds: once, and for each request in it.

    From the time between tokens of one request, and of CROWD at once; of each a median over the rounds.
    """
    from .runtime import Engine, Request, Sampling
    from .runtime.loader import ArtifactModules

    _, contents = load_artifact(directory)
    cost = ArtifactModules(directory, contents, ("cost",)).load("cost")
    request = Request(tuple(i % 256 for i in range(prompt)), tokens, Sampling(ignore_eos=True))
    beyond_s: dict[int, list[float]] = {1: [], CROWD: []}
    with Engine.start(directory, weights, prefix_caching=False) as engine:
        for _ in range(rounds):
            for count, found in beyond_s.items():
                handles = [engine.submit(request) for _ in range(count)]
                last = [handle.result() for handle in handles][-1]
                cached = count * (prompt + tokens // 2)
                explained_s = cost.crossing_s(T=count, R=count, QK=0, KV=0, KD=cached, X=0)
                together = last.tbt_s[: tokens - 1 - 2 * count]  # by then the first have ended
                found.append(statistics.median(together) - explained_s)
    one_s, crowd_s = (statistics.median(found) for found in beyond_s.values())
    row_s = max(0.0, crowd_s - one_s) / (CROWD - 1)
    return max(0.0, one_s - row_s), row_s
