"""`mnemoc calibrate` of a GPU: a cluster file of nodes of such GPUs, with figures measured on it.

First the tiles of our kernels, [tiles]; then, with the best of them, what the device gives; then our
attention beside that of every provider that is installed, [kernels].

One GPU cannot tell how nodes are wired, what an iteration of the engine costs, or how much memory a library
keeps: those figures stay as the shipped file of such nodes has them, with the sources that they have there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .calibration import Steps, rising
from .errors import BadInput, RuntimeFault
from .tiles import MeasuredTiles

if TYPE_CHECKING:
    import torch

    from .codegen.kernels import KernelSpec
    from .codegen.tiles import Tiles
    from .console import Progress
    from .planner import Cluster
    from .runtime.clocks import Race
    from .runtime.probes_gpu import Figures, Points, Shape
    from .runtime.probes_providers import Points as SpeedPoints
    from .tuning import Sizes as SearchSizes

    Figure = tuple[float | Sequence[tuple[float, ...]], str, str]

SHIPPED: Mapping[str, str] = {
    "H200": "dgx-h200",
    "H100": "dgx-h100",
    "B200": "dgx-b200",
    "A100": "dgx-a100",
}
"""Part of a GPU's name → the shipped cluster of such GPUs."""

PAGE = 64
NODE = 8  # GPUs over which heads and columns are cut at most
K = 1 << 10


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
    out: Path | None,
    progress: Progress | None = None,
    *,
    quick: bool = False,
    tiles: MeasuredTiles | None = None,
) -> tuple[Path, Cluster]:
    """Measure the first GPU with the kernels that plans of Llama 3 8B emit; write `out`, or the file that
    `--cluster local` reads. BadInput where there is no GPU, or none of a kind that we have a file of.

    The search for tiles goes on from those that the file has already.
    quick: fewer sizes, and no search: tiles stay as they are; tiles: in place of a search
    """
    import torch

    from .codegen.tiles import refreshed
    from .planner import measured_path
    from .runtime import probes_gpu, probes_providers
    from .runtime.clocks import graph_race
    from .tuning import Search, refresh

    if not torch.cuda.is_available():
        raise BadInput(
            "no CUDA device is here", do="leave --gpu out, or give --cpu, to measure the CPU"
        )
    device = torch.device("cuda", 0)
    name = shipped_name(torch.cuda.get_device_name(device))
    major, minor = torch.cuda.get_device_capability(device)
    spec, path, say = base_spec(f"cuda:sm_{major}{minor}"), out or measured_path(), Steps(progress)
    arch = f"sm_{major}{minor}"
    searched = tiles is None and not quick
    tiles = tiles_of(path, arch) if tiles is None else tiles
    if searched:
        search = Search(spec, refreshed(arch, tiles), search_sizes(spec.target), device, graph_race)
        tiles = refresh(search, tiles, lambda share: say.at("searching tiles", share * _TILES))
    loaded, shape = load_kernels(spec, refreshed(arch, tiles)), shape_of(spec)
    sizes = probes_gpu.QUICK if quick else probes_gpu.FULL
    begun = _TILES if searched else 0.0
    probes = probes_gpu.Probes(loaded, shape, sizes, device, getattr(torch, spec.dtype))
    measured = probes.measure(
        lambda share: say.at("measuring the GPU", begun + share * (_SPEEDS - begun))
    )
    say.at("measuring providers of attention", _SPEEDS)
    points = probes_providers.QUICK if quick else probes_providers.FULL
    speeds = measure_speeds(spec, loaded, points, device, graph_race)
    memory = torch.cuda.get_device_properties(device).total_memory
    device_name = torch.cuda.get_device_name(device)
    return path, write(path, name, device_name, memory, measured, tiles, speeds)


_TILES, _SPEEDS = 0.6, 0.9  # of the whole time: when the search is over, and when providers begin


def base_spec(target: str) -> KernelSpec:
    """What kernels are measured for: one rank of Llama 3 8B."""
    from .codegen.kernels import KernelSpec
    from .ir.model import load_model

    spec = load_model("llama-3-8b")
    return KernelSpec(
        target=target,
        dtype=spec.dtype,
        hidden=spec.hidden,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        merged_heads=spec.num_heads,
        head_dim=spec.head_dim,
        ffn=spec.ffn,
        page_size=PAGE,
        norm_eps=spec.norm_eps,
        qk_norm=spec.qk_norm,
        inv_freq=spec.rope.inv_freq(spec.head_dim),
        attention_factor=spec.rope.attention_factor,
    )


def shape_of(spec: KernelSpec) -> Shape:
    from .runtime.probes_gpu import Shape

    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
    return Shape(spec.hidden, spec.ffn, *heads, spec.page_size)


def load_kernels(spec: KernelSpec, tiles: Tiles) -> dict[str, ModuleType]:
    """The modules that are measured, by name."""
    from .codegen.kernels import render_kernels
    from .runtime.loader import ArtifactModules

    contents = {path: text.encode() for path, text in render_kernels(spec, tiles).items()}
    loader = ArtifactModules(Path("calibrate"), contents, ("kernels/",))
    names = ("attention_prefill", "attention_decode", "rms_norm")
    return {name: loader.load(f"kernels.{name}") for name in names}


# ------------------------------------------------------------------------------------- the tiles


def tiles_of(path: Path, arch: str) -> MeasuredTiles:
    """Those that a cluster file has for an architecture, or none yet. BadInput: it is no cluster file."""
    from .planner import CALIBRATED, load_cluster

    known = load_cluster(str(path)).tiles if path.exists() else None
    if known is not None and known.arch == arch:
        return known
    return MeasuredTiles(arch, CALIBRATED, {}, {})


def search_sizes(target: str) -> SearchSizes:
    """Attention of Llama 3 8B alone and of 70B on eight ranks; rows of all presets on one and eight."""
    from .ir.model import load_model, presets
    from .tuning import Attended, Sizes

    hidden, ffn, attention = set(), set(), set()
    for model in (load_model(name) for name in presets() if not name.startswith("tiny")):
        hidden.add(model.hidden)
        for tp in (1, NODE):
            if model.ffn % tp == model.num_heads % tp == 0:
                ffn.add(model.ffn // tp)
                attention.add(model.num_heads // tp * model.head_dim)
    head_dim = {base_spec(target).head_dim}
    widths = {"rms_norm": hidden, "swiglu": ffn, "rope_append": head_dim, "merge": head_dim}
    if target != "cuda:sm_80":  # which has no 8-bit floats
        widths |= {"quantize": attention, "swiglu_fp8": ffn}
    return Sizes(
        attention={
            "attention_prefill": (Attended(32, 8, 2048, (16 * K,)), Attended(8, 1, 32, (K * K,))),
            "attention_decode": (Attended(8, 1, 1, (128 * K,)), Attended(32, 8, 1, (8 * K,) * 64)),
        },
        widths={module: tuple(sorted(all_)) for module, all_ in widths.items()},
        counts=(32, 2048),
        cold=192 << 20,
    )


# ------------------------------------------------------------------------------------ the speeds


def measure_speeds(
    spec: KernelSpec,
    ours: Mapping[str, ModuleType],
    points: SpeedPoints,
    device: torch.device,
    race: Race,
) -> dict[str, Figure]:
    """[kernels.attention_prefill] and [kernels.attention_decode]: our own speed and that of all others here.

    Empty for an op that nobody else serves: there is nothing to choose.
    """
    import torch

    from .codegen.providers import OPS, OURS
    from .planner import CALIBRATED, SPEED_UNITS
    from .runtime.attending import Paged
    from .runtime.probes_providers import Kernel, measure

    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
    figures: dict[str, Figure] = {}
    with torch.inference_mode():
        for op in OPS:
            others = {name: Kernel(*served) for name, served in installed(op, spec).items()}
            if not others:
                continue
            kernels = {OURS: Kernel(ours[op], spec.page_size), **others}
            room = points.tokens(max(kernel.page for kernel in kernels.values()))
            paged = Paged(*heads, room, device, getattr(torch, spec.dtype))
            found = measure(op, kernels, OURS, paged, points, race)
            unit = next(iter(SPEED_UNITS[op]))
            left_out = "".join(f"; {name} left out: {why}" for name, why in found.refused.items())
            for name, speeds in found.points.items():
                source = CALIBRATED + (left_out if name == OURS else "")
                figures[f"kernels.{op}.{name}"] = (speeds, unit, source)
    return figures


def installed(op: str, spec: KernelSpec) -> dict[str, tuple[ModuleType, int]]:
    """Modules of the providers that are here and have kernels for the device, with the pages they take."""
    from .codegen.providers import PROVIDERS, Choice, render_provider
    from .runtime.loader import ArtifactModules

    found = {}
    for name, provider in PROVIDERS.items():
        if provider.pages is None or spec.target.partition(":")[2] not in provider.architectures:
            continue
        page = max(provider.pages, spec.page_size)
        text = render_provider(Choice(op, name, 1.0, {}), dataclasses.replace(spec, page_size=page))
        contents = {f"kernels/{op}.py": text.encode(), "kernels/__init__.py": b""}
        loader = ArtifactModules(Path(f"calibrate-{name}"), contents, ("kernels/",))
        with contextlib.suppress(RuntimeFault):  # it is not installed
            found[name] = loader.load(f"kernels.{op}"), page
    return found


# --------------------------------------------------------------------------------------- the file


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
