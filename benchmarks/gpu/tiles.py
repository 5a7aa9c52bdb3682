"""Searches tiles as `mnemoc calibrate` does, a candidate a case: today's neighbours, timed beside it.

What comes of it stands in OUT/cluster.toml as [tiles], which plans take, and `--tiles` measures with; where
nothing is faster by a margin, it is today's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mnemoc import calibration_gpu
from mnemoc.codegen.tuning import Candidate, best
from mnemoc.planner import load_cluster
from mnemoc.tiles import ATTENTION, Cut, Tile
from mnemoc.tuning import Search

from .calibrate import CLUSTER_FILE
from .device import Run
from .kernels import has_fp8, kernel_spec
from .plans import cluster_of
from .runner import Case, Figures, Section, Setup, read
from .timing import race
from .work import Heads


def cases(setup: Setup) -> Sequence[Case]:
    searching = search(setup)
    return [
        Case(str(candidate), _case(searching, candidate)) for candidate in searching.candidates()
    ]


def search(setup: Setup) -> Search:
    """Over the sizes of this run, from the tiles of this run."""
    sizes, device = setup.sizes.tiles, setup.device
    if not has_fp8(device.target):
        widths = {
            k: all_ for k, all_ in sizes.widths.items() if k not in ("quantize", "swiglu_fp8")
        }
        sizes = dataclasses.replace(sizes, widths=widths)

    def median(runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
        found = race(device, runs, setup.sizes.least_s)
        return {name: timing.median_s for name, timing in found.items()}

    spec = kernel_spec(device.target, Heads("RoPE", 8, 2, setup.sizes.heads[0].dim), device.dtype)
    return Search(spec, setup.tiles, sizes, device.place, median)


def _case(searching: Search, candidate: Candidate) -> Callable[[], list[Figures]]:
    return lambda: [
        {
            "kernel": candidate.module,
            "width": candidate.width,
            "tile": str(candidate.entry),
            "fields": dataclasses.asdict(candidate.entry),
            "of": trial.of,
            "median_s": trial.seconds,
            "of_today": trial.share,
            "note": trial.note,
        }
        for trial in searching.trials(candidate)
    ]


def write_best(setup: Setup) -> None:
    """[tiles] of OUT/cluster.toml from all candidates that were timed; nothing if none was."""
    shares: dict[Candidate, list[float | None]] = {}
    for rows in read(setup.out, "tiles").values():
        for row in rows:
            if "fields" in row:
                shares.setdefault(_candidate(row), []).append(row["of_today"])
    if not shares:
        return
    found = best(setup.measured, shares, search(setup).fits)
    path = setup.out / CLUSTER_FILE
    shipped = cluster_of(setup.device.machine.device) or load_cluster("dgx-h100")
    cluster = load_cluster(str(path)) if path.exists() else shipped
    calibration_gpu.with_tiles(path, cluster, found)


def _candidate(row: Mapping[str, Any]) -> Candidate:
    kind = Tile if row["kernel"] in ATTENTION else Cut
    return Candidate(row["kernel"], row["width"], kind(**row["fields"]))


SECTION = Section("tiles", "Tiles, beside today's", cases)
