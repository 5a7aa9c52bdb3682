"""Planned module + plan → the files of an artifact, byte for byte the same from the same inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy

from ..artifact import FP8, Plan, Workload
from ..ir.graph import Module
from ..ir.model import ModelSpec
from ..ir.text import print_module
from ..speeds import KernelSpeeds, Swap
from ..tiles import MeasuredTiles
from .aot import REPORT, compile_kernels
from .cost import render_cost
from .fitting import refuse_unfit
from .kernels import FLOAT8, KernelSpec, render_kernels
from .providers import provide
from .schedule import render_schedule
from .tiles import TILES, refreshed


@dataclass(frozen=True)
class Emission:
    """What codegen is given. `source` is the module before planning, `planned` the lowered one.

    formulas, host_s, swap: what prices each block, and copies of pages (see `cost.render_cost`)
    workload, speeds: what the plan is for, and measured speeds of kernels, for the choice of `providers`
    tiles: what our own are cut by, where that was measured
    """

    spec: ModelSpec
    plan: Plan
    source: Module
    planned: Module
    formulas: Mapping[str, Mapping[str, sympy.Expr]]
    host_s: Mapping[str, float]
    workload: Workload
    speeds: KernelSpeeds
    swap: Swap | None = None
    tiles: MeasuredTiles | None = None


def emit(job: Emission, progress: Callable[[str], None] = lambda message: None) -> dict[str, bytes]:
    """Every file of the artifact but its manifest, by relative path. BadInput: a tile does not fit."""
    kernels_of = kernel_spec(job.spec, job.plan)
    arch = job.plan.target.partition(":")[2]
    tiles = refreshed(arch, job.tiles) if arch in TILES else None  # rendering refuses other GPUs
    kernels = render_kernels(kernels_of, tiles)
    provided = provide(kernels_of, job.plan, job.workload, job.speeds)
    kernels |= {path: text for path, text in provided.items() if path in kernels}
    texts = {
        "ir/model.mir": print_module(job.source),
        "ir/planned.mir": print_module(job.planned),
        **kernels,
        **provided,
        **render_schedule(job.planned, job.plan),
        "cost.py": render_cost(job.formulas, job.host_s, job.plan, job.swap),
    }
    files = {path: text.encode() for path, text in texts.items()}
    if job.plan.target.startswith("cuda"):
        compiled = compile_kernels(kernels_of, kernels, progress)
        if job.tiles is not None:
            refuse_unfit(json.loads(compiled[REPORT])["kernels"], kernels_of, job.tiles)
        files |= compiled
    return files


def kernel_spec(spec: ModelSpec, plan: Plan) -> KernelSpec:
    """What the plan's kernels are specialised for, per rank."""
    tp = plan.layout.tp
    ranks = (
        tp * plan.layout.kvp if plan.layout.helix else tp
    )  # over which what follows attention is cut
    return KernelSpec(
        target=plan.target,
        dtype=plan.dtype,
        hidden=spec.hidden,
        num_heads=spec.num_heads // tp,
        num_kv_heads=max(1, spec.num_kv_heads // tp),
        merged_heads=spec.num_heads // ranks,
        head_dim=spec.head_dim,
        ffn=spec.ffn // ranks if spec.ffn % ranks == 0 else spec.ffn,
        page_size=plan.page_size,
        norm_eps=spec.norm_eps,
        qk_norm=spec.qk_norm,
        inv_freq=spec.rope.inv_freq(spec.head_dim),
        attention_factor=spec.rope.attention_factor,
        kv_dtype=FLOAT8 if plan.precision.kv_cache == FP8 else plan.dtype,
        fp8=plan.precision.weights == FP8,
        peers=max(1, plan.layout.kvp - 1),
        sum_ranks=tp if plan.one_shot_rows else 1,
    )
