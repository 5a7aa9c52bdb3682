"""Joins the stages: each function here is one job of mnemoc, one named call per stage.

predict   ModelSpec + Cluster + a pinned configuration → figures with bands
plan      ModelSpec + Cluster + Workload → Plan → per-rank modules → artifact
export    an artifact → the command or file that comes closest on another engine
verify    the plan's runtime against the interpreter on the unsharded module
calibrate this machine → a cluster file
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import AUTO, FP8, Manifest, Plan, Precision, Workload
from .codec import from_json, to_json
from .folder import MANIFEST, load_artifact, refuse_if_taken, write_artifact
from .layout import Layout

if TYPE_CHECKING:
    from .codegen import Export, Launch
    from .ir.graph import Module
    from .ir.interpret import Interpreter
    from .ir.model import ModelSpec
    from .planner import Cluster, Configuration, Forecast, StageFormulas, WhatIf
    from .speeds import Swap

Progress = Callable[[str], None]
VERIFY_TOKENS = 2048


def _silent(message: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made from, the formulas that priced it, and the price of a copy of pages."""

    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    plan: Plan
    formulas: StageFormulas
    swap: Swap | None


def plan(
    model: str,
    cluster: str,
    workload: Workload,
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    target: str | None = None,
    pinned: Mapping[str, int | str] | None = None,
    precision: Precision = AUTO,
    eager: bool = False,
    pareto: bool = False,
) -> Planned:
    """Model, cluster and promise → the plan. Infeasible says which constraint binds.

    pareto: with the frontier of GPUs, TTFT and TBT.
    """
    from .ir.model import load_model
    from .planner import WhatIf, load_cluster

    question = WhatIf(
        load_model(model),
        load_cluster(cluster),
        workload,
        nodes=nodes,
        gpus=gpus,
        target=target,
        pinned=pinned,
        precision=precision,
        eager=eager,
    )
    return plan_for(question, pareto=pareto)


def plan_for(question: WhatIf, *, pareto: bool = False) -> Planned:
    """The same for a question that is asked already."""
    from .planner import plan_of

    made = plan_of(question, pareto=pareto)
    return Planned(
        question.spec,
        question.cluster,
        question.workload,
        made.plan,
        made.formulas,
        made.swap,
    )


def predict(model: str, cluster: str, asked: Configuration) -> tuple[ModelSpec, Cluster, Forecast]:
    """What a pinned configuration is predicted to do, with the model and cluster that it was asked of."""
    from .ir.model import load_model
    from .planner import forecast, load_cluster

    spec, machine = load_model(model), load_cluster(cluster)
    return spec, machine, forecast(spec, machine, asked)


def apply(planned: Planned) -> tuple[Module, Module]:
    """The model's module before planning, and the same sharded, fused, staged and lowered."""
    from .ir.build import build
    from .ir.passes import carry, fuse, lower, one_shot, overlap, quantize, shard, split_stages
    from .ir.verify import verify

    layout, stages, precision = planned.plan.layout, planned.plan.stages, planned.plan.precision
    source = verify(build(planned.spec, planned.plan.dtype, precision.kv_cache))
    sharded = verify(shard(source, tp=layout.tp, kvp=layout.kvp, ffn=layout.ffn))
    fused = verify(fuse(sharded))
    typed = verify(quantize(fused)) if precision.weights == FP8 else fused
    halved = verify(overlap(typed)) if planned.plan.overlap_rows else typed
    counts, roles = [s.num_layers for s in stages], [s.role for s in stages]
    carried = verify(carry(verify(split_stages(halved, counts, roles))))
    summed = verify(one_shot(carried)) if planned.plan.one_shot_rows else carried
    return source, verify(lower(summed, planned.plan.target))


def emit(planned: Planned, out: Path, progress: Progress = _silent) -> Manifest:
    """Write the plan's artifact to `out`, whole or not at all."""
    from .codegen import render_launch

    refuse_if_taken(out)
    manifest = Manifest(
        model=to_json(planned.spec),
        cluster=planned.cluster.describe(),
        workload=planned.workload,
        plan=planned.plan,
    )
    source, module = apply(planned)
    files = _files(planned, source, module, progress) | render_launch(launch_of(planned))
    return write_artifact(out, manifest, {**files, "report.html": _report(planned, module)})


def dump(planned: Planned, what: Sequence[str], progress: Progress = _silent) -> dict[str, str]:
    """Intermediates as text, by artifact path. `what`: of ir, plan, kernels, schedule."""
    files = _files(planned, *apply(planned), progress) if set(what) - {"plan"} else {}
    texts = {"plan.json": json.dumps(to_json(planned.plan), indent=1)} if "plan" in what else {}
    folders = tuple(f"{folder}/" for folder in what if folder != "plan")
    return texts | {
        path: data.decode()
        for path, data in files.items()
        if path.startswith(folders) and not path.endswith(".cubin")
    }


def describe(planned: Planned) -> dict[str, Any]:
    """The plan as plain data: what `mnemoc plan --json` prints."""
    body: dict[str, Any] = to_json(planned.plan)
    return {
        "model": planned.spec.name,
        "cluster": planned.cluster.name,
        "workload": to_json(planned.workload),
        "gpus": planned.plan.gpus,
        **body,
    }


def _files(
    planned: Planned, source: Module, module: Module, progress: Progress
) -> dict[str, bytes]:
    from .codegen import Emission
    from .codegen import emit as emit_files

    parts = {block: formula.parts for block, formula in planned.formulas.items()}
    host_s = {block: formula.host_s for block, formula in planned.formulas.items()}
    job = Emission(
        planned.spec,
        planned.plan,
        source,
        module,
        parts,
        host_s,
        planned.workload,
        planned.cluster.kernels,
        planned.swap,
        planned.cluster.tiles,
    )
    return emit_files(job, progress)


def _report(planned: Planned, module: Module) -> bytes:
    from .codegen import Report, render_report
    from .planner import make_timeline

    plan, workload = planned.plan, planned.workload
    timeline = make_timeline(plan, workload, planned.formulas)
    cluster = planned.cluster.describe()
    page = Report(planned.spec.name, cluster, workload, plan, module, timeline)
    return render_report(page).encode()


def launch_of(planned: Planned) -> Launch:
    """What of a plan says how it is started. RDMA: where the cluster file names such a network."""
    from .codegen import Launch

    cluster = planned.cluster
    network = cluster.numbers["links.inter.bandwidth"].source
    rdma = any(name in network for name in ("InfiniBand", "RoCE"))
    model, plan = planned.spec.name, planned.plan
    return Launch(model, planned.workload, plan, cluster.devices_per_node, rdma)


def export(directory: Path, engine: str) -> Export:
    """What comes closest to an artifact's plan on another engine, and what that leaves out."""
    from .codegen import Subject
    from .codegen import export as write
    from .ir.model import ModelSpec

    manifest, _ = load_artifact(directory)
    spec = from_json(ModelSpec, manifest.model, str(directory / MANIFEST))
    per_node = int(manifest.cluster["numbers"]["devices_per_node"]["value"])
    return write(engine, Subject(spec, manifest.workload, manifest.plan, per_node))


# ----------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verification:
    """The plan's runtime against the unsharded reference on one prompt.

    largest_difference: max |logit − reference| over the checked rows
    first_mismatch:     index of the first greedy token that differs, or None
    """

    layout: Layout
    prompt_tokens: int
    output_tokens: int
    checked_rows: int
    largest_difference: float
    largest_logit: float
    first_mismatch: int | None

    @property
    def agrees(self) -> bool:
        return self.first_mismatch is None

    @property
    def sentence(self) -> str:
        greedy = (
            f"all {self.output_tokens} greedy tokens agree"
            if self.agrees
            else f"greedy token {self.first_mismatch} of {self.output_tokens} DIFFERS"
        )
        return (
            f"{self.layout} against the unsharded reference, {self.prompt_tokens} prompt tokens: "
            f"largest logit difference {self.largest_difference:.2g} over {self.checked_rows} rows "
            f"(largest logit {self.largest_logit:.3g}); {greedy}"
        )


def verify(
    directory: Path,
    weights: Path,
    prompt_ids: Sequence[int] | None,
    max_tokens: int,
    progress: Progress = _silent,
) -> Verification:
    """Run the plan, then interpret the unsharded IR over what it produced, and compare.

    The reference is evaluated in float32 in one pass over prompt and output: row i of its logits is
    what the plan saw when it chose token i + 1. Without a prompt, random tokens up to 2,048. Of a plan in fp8
    it is in fp8 too: what the plan's dtype rounds otherwise may there be a whole step of an 8-bit float.
    """
    import numpy as np

    from .ir.interpret import Chunk
    from .ir.model import ModelSpec
    from .runtime import Engine, Request, Sampling

    manifest, _ = load_artifact(directory)
    spec = from_json(ModelSpec, manifest.model, str(directory / MANIFEST))
    if prompt_ids is None:
        length = max(1, min(VERIFY_TOKENS, manifest.workload.context))
        prompt_ids = np.random.default_rng(0).integers(0, spec.vocab, length).tolist()
    progress("running the plan")
    with Engine.start(directory, weights) as engine:
        request = Request(tuple(prompt_ids), max_tokens, Sampling(ignore_eos=True), logits="all")
        result = engine.submit(request).result()
    progress("interpreting the unsharded reference")
    reference = _reference(spec, manifest.plan.precision, weights)
    tokens = (*prompt_ids, *result.tokens[:-1])
    expected = reference.run([Chunk(0, 0, tokens)], range(len(tokens)))
    greedy = expected[len(prompt_ids) - 1 :].argmax(axis=1)
    wrong = np.flatnonzero(greedy != np.array(result.tokens))
    return Verification(
        layout=manifest.plan.layout,
        prompt_tokens=len(prompt_ids),
        output_tokens=len(result.tokens),
        checked_rows=len(tokens),
        largest_difference=float(np.abs(result.logits - expected).max()),
        largest_logit=float(np.abs(expected).max()),
        first_mismatch=int(wrong[0]) if len(wrong) else None,
    )


def _reference(spec: ModelSpec, precision: Precision, weights: Path) -> Interpreter:
    """The unsharded model in float32, its products and its cache in the plan's precision."""
    import numpy as np

    from .ir.build import build
    from .ir.graph import sources_and_copies
    from .ir.interpret import Interpreter
    from .ir.ops.e4m3 import scaled
    from .ir.passes import fuse, quantize, shard
    from .ir.types import E4M3
    from .runtime.rank.weights import numpy_weights

    module, tensors = build(spec, "float32", precision.kv_cache), numpy_weights(weights)
    if precision.weights == FP8:
        module = quantize(fuse(shard(module, tp=1, kvp=1)))
        params = (op for op in module.functions["layer"].ops if op.name == "param")
        sources = [s for op in params if op.type.dtype == E4M3 for s in sources_and_copies(op)[0]]
        for name in (s.format(layer=layer) for s in sources for layer in range(spec.num_layers)):
            if f"{name}_scale" not in tensors:
                tensors[name], tensors[f"{name}_scale"] = scaled(tensors[name])
    return Interpreter(module, tensors, dtype=np.float32)
