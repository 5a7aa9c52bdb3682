"""Kernels in a GPU's calibration: for what they are measured, which tiles are tried, who else is there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch

from .codegen.kernels import KernelSpec, render_kernels
from .codegen.providers import OPS, OURS, PROVIDERS, Choice, render_provider
from .codegen.tiles import Tiles
from .errors import RuntimeFault
from .ir.model import load_model, presets
from .planner import CALIBRATED, SPEED_UNITS, load_cluster
from .runtime.loader import ArtifactModules
from .runtime.measuring.attending import Paged
from .runtime.measuring.clocks import Race
from .runtime.measuring.probes_gpu import Shape
from .runtime.measuring.probes_providers import Kernel, Points, measure
from .tiles import MeasuredTiles
from .tuning import Attended, Sizes

Figure: TypeAlias = tuple[float | Sequence[tuple[float, ...]], str, str]
"""A number or points, their unit and source: an entry of a cluster file."""

PAGE = 64
NODE = 8  # GPUs over which heads and columns are cut at most
K = 1 << 10


def base_spec(target: str) -> KernelSpec:
    """What kernels are measured for: one rank of Llama 3 8B."""
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
    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
    return Shape(spec.hidden, spec.ffn, *heads, spec.page_size)


def load_kernels(spec: KernelSpec, tiles: Tiles) -> dict[str, ModuleType]:
    """The modules that are measured, by name."""
    contents = {path: text.encode() for path, text in render_kernels(spec, tiles).items()}
    loader = ArtifactModules(Path("calibrate"), contents, ("kernels/",))
    names = ("attention_prefill", "attention_decode", "rms_norm")
    return {name: loader.load(f"kernels.{name}") for name in names}


# ------------------------------------------------------------------------------------- the tiles


def tiles_of(path: Path, arch: str) -> MeasuredTiles:
    """Those that a cluster file has for an architecture, or none yet. BadInput: it is no cluster file."""
    known = load_cluster(str(path)).tiles if path.exists() else None
    if known is not None and known.arch == arch:
        return known
    return MeasuredTiles(arch, CALIBRATED, {}, {})


def search_sizes(target: str) -> Sizes:
    """Attention of Llama 3 8B alone and of 70B on eight ranks; rows of all presets on one and eight."""
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
    points: Points,
    device: torch.device,
    race: Race,
) -> dict[str, Figure]:
    """[kernels.attention_prefill] and [kernels.attention_decode]: our own speed and that of all others here.

    Empty for an op that nobody else serves: there is nothing to choose.
    """

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
