"""`mnemoc calibrate` of a GPU: a cluster file of nodes of such GPUs, with figures measured on it.

First the tiles of our kernels, [tiles]; then, with the best of them, what the device gives; then our
attention beside that of every provider that is installed, [kernels].

One GPU cannot tell how nodes are wired, what an iteration of the engine costs, or how much memory a library
keeps: those figures stay as the shipped file of such nodes has them, with the sources that they have there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration import Steps, rising, way_figures
from .errors import BadInput

if TYPE_CHECKING:
    import torch

    from .calibration_kernels import Figure
    from .codegen.kernels import KernelSpec
    from .codegen.tiles import Tiles
    from .console import Progress
    from .planner import Cluster
    from .runtime.measuring.clocks import Race
    from .runtime.measuring.probes_gpu import Figures, Points, Sizes
    from .runtime.measuring.probes_providers import Points as SpeedPoints
    from .tiles import MeasuredTiles
    from .tuning import Sizes as SearchSizes

SHIPPED: Mapping[str, str] = {
    "H200": "dgx-h200",
    "H100": "dgx-h100",
    "B200": "dgx-b200",
    "A100": "dgx-a100",
}
"""Part of a GPU's name → the shipped cluster of such GPUs."""


def shipped_name(device: str) -> str:
    """The shipped cluster file that a GPU's figures complete. BadInput if there is none."""
    for part, name in SHIPPED.items():
        if part in device:
            return name
    raise BadInput(
        "no shipped cluster file has GPUs of this kind",
        got=device,
        do=f"write one by hand; there are files for {', '.join(SHIPPED)}",
    )


def calibrate_gpu(
    out: Path | None, progress: Progress | None = None, *, quick: bool = False
) -> tuple[Path, Cluster]:
    """Measure the first GPU with the kernels that plans of Llama 3 8B emit; write `out`, or the file that
    `--cluster local` reads. BadInput where there is no GPU, or none of a kind that we have a file of.

    The search for tiles goes on from those that the file has already.
    quick: fewer sizes, and no search: tiles stay as they are
    """
    from .calibration_kernels import search_sizes, tiles_of
    from .planner import measured_path
    from .runtime.measuring import probes_gpu, probes_providers

    bench, path = this_gpu(), out or measured_path()
    effort = Effort(
        None if quick else search_sizes(bench.spec.target),
        probes_gpu.QUICK if quick else probes_gpu.FULL,
        probes_providers.QUICK if quick else probes_providers.FULL,
    )
    tiles = tiles_of(path, bench.spec.target.partition(":")[2])
    return path, calibrate_device(path, bench, effort, tiles, progress)


@dataclass(frozen=True)
class Bench:
    """What is measured, and by which clock.

    cluster: the shipped file of such devices; title: the device's name; spec: what kernels are measured for
    own: the architecture's tiles
    """

    cluster: str
    title: str
    memory_bytes: int
    spec: KernelSpec
    own: Tiles
    device: torch.device
    race: Race


@dataclass(frozen=True)
class Effort:
    """What is tried: tiles, if any are searched for; the device; providers of attention."""

    search: SearchSizes | None
    sizes: Sizes
    points: SpeedPoints


def this_gpu() -> Bench:
    """The first CUDA device. BadInput where there is none, or none of a kind that we have a file of."""
    import torch

    from .calibration_kernels import base_spec
    from .codegen.tiles import TILES
    from .runtime.measuring.clocks import graph_race

    if not torch.cuda.is_available():
        raise BadInput(
            "no CUDA device is here", do="leave --gpu out, or give --cpu, to measure the CPU"
        )
    device = torch.device("cuda", 0)
    title = torch.cuda.get_device_name(device)
    cluster = shipped_name(title)
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    spec, own = base_spec(f"cuda:sm_{major}{minor}"), TILES[f"sm_{major}{minor}"]
    return Bench(cluster, title, memory, spec, own, device, graph_race)


_TILES, _SPEEDS = 0.6, 0.9  # of the whole time: when the search is over, and when providers begin


def calibrate_device(
    path: Path,
    bench: Bench,
    effort: Effort,
    tiles: MeasuredTiles,
    progress: Progress | None = None,
) -> Cluster:
    """Measure a device and write its cluster file. tiles: those to begin with."""
    import torch

    from .calibration_kernels import load_kernels, measure_speeds, shape_of
    from .runtime.measuring.probes_gpu import Probes
    from .tuning import Search, refresh

    spec, device, race, say = bench.spec, bench.device, bench.race, Steps(progress)
    begun = 0.0
    if effort.search is not None:
        search = Search(spec, bench.own.refreshed(tiles), effort.search, device, race)
        tiles = refresh(search, tiles, lambda share: say.at("searching tiles", share * _TILES))
        begun = _TILES
    kernels, dtype = load_kernels(spec, bench.own.refreshed(tiles)), getattr(torch, spec.dtype)
    probes = Probes(
        kernels, shape_of(spec), effort.sizes, device, dtype, lambda calls: race({"": calls})[""]
    )
    measured = probes.measure(
        lambda share: say.at("measuring the GPU", begun + share * (_SPEEDS - begun))
    )
    say.at("measuring providers of attention", _SPEEDS)
    speeds = measure_speeds(spec, kernels, effort.points, device, race)
    return write(path, bench.cluster, bench.title, bench.memory_bytes, measured, tiles, speeds)


def write(
    path: Path,
    name: str,
    device: str,
    memory_bytes: int,
    measured: Figures,
    tiles: MeasuredTiles | None = None,
    speeds: Mapping[str, Figure] | None = None,
) -> Cluster:
    """The cluster file `name`, with what was measured in place of what was shipped."""
    from .planner import CALIBRATED, load_cluster, write_cluster

    peaks: dict[str, Figure] = {
        f"peak.{dtype}": (measured.peak_flops, "FLOP/s", CALIBRATED)
        for dtype in ("bfloat16", "float16")
    }
    curves: dict[str, tuple[Points, float, str]] = {
        "matmul": (measured.matmul, measured.peak_flops, "rows"),
        "attention_prefill": (measured.attention_prefill, measured.peak_flops, "rows"),
        "attention_decode": (measured.attention_decode, measured.bandwidth, "B"),
        "memory": (measured.memory, measured.bandwidth, "B"),
    }
    if measured.peak_fp8_flops is not None:
        peaks["peak.float8"] = (measured.peak_fp8_flops, "FLOP/s", CALIBRATED)
        curves["matmul_fp8"] = (measured.matmul_fp8, measured.peak_fp8_flops, "rows")
    figures: dict[str, Figure] = {
        **peaks,
        "memory.bandwidth": (measured.bandwidth, "B/s", CALIBRATED),
        "memory.capacity": (float(memory_bytes), "B", CALIBRATED),
        **{
            f"efficiency.{key}": (rising(points, best), unit, CALIBRATED)
            for key, (points, best, unit) in curves.items()
        },
        "overhead.launch": (measured.launch_s, "s", CALIBRATED),
        "overhead.launch_captured": (measured.gap_s, "s", CALIBRATED),
        **way_figures("host", measured.host, CALIBRATED),
    }
    figures |= speeds or {}
    target = load_cluster(name).target
    kept = tiles if tiles and (tiles.attention or tiles.rows) else None
    return write_cluster(path, name=name, device=device, target=target, figures=figures, tiles=kept)


def with_tiles(path: Path, cluster: Cluster, tiles: MeasuredTiles) -> Cluster:
    """Write a cluster, measured or shipped, with these tiles."""
    from .planner import load_cluster, write_cluster

    shipped = load_cluster(cluster.name)
    figures: dict[str, Figure] = {
        **{key: (q.value, q.unit, q.source) for key, q in cluster.numbers.items()},
        **{
            f"efficiency.{key}": (curve.points, curve.unit, curve.source)
            for key, curve in cluster.curves.items()
            if curve != shipped.curves.get(key)
        },
        **{
            f"kernels.{op}.{name}": (speeds.points, speeds.unit, speeds.source)
            for op, by_name in cluster.kernels.items()
            for name, speeds in by_name.items()
        },
    }
    heads = {"name": cluster.name, "device": cluster.device, "target": cluster.target}
    return write_cluster(path, **heads, figures=figures, tiles=tiles)
