"""The planner's door: model, cluster and promise → the plan, proven and re-checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..artifact import Optimality, Plan, Stage, Workload
from ..errors import UsageError
from ..ir.model import ModelSpec
from .check import violations
from .cluster import CALIBRATED, TARGETS, Cluster
from .cost import StageFormulas
from .explain import alternatives, binding, infeasible, remarks
from .predict import chunk_rules, memory, predict
from .price import Pricer
from .search import Finding, Promise, Search
from .space import Pins, devices_asked
from .workload import check_workload, workload_notes


@dataclass(frozen=True)
class Made:
    """A plan, and the formulas that priced it: block → part → seconds (see `cost`)."""

    plan: Plan
    formulas: StageFormulas


def make_plan(
    spec: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    target: str | None = None,
    pinned: Pins | None = None,
) -> Made:
    """The optimal plan for a promise.

    nodes, gpus: most that may be used; target: the cluster's by default; pinned: of the layout.
    Infeasible names the binding constraint and the cheapest ways to relax it; BadInput and UsageError
    say what about the question makes no sense.
    """
    check_workload(workload)
    target = _target(cluster, target)
    devices = devices_asked(cluster, nodes=nodes, gpus=gpus)
    dtype = "float32" if target == "cpu" else spec.dtype
    pricer = Pricer(spec, cluster, dtype, workload)
    search = Search(pricer, devices, dict(pinned or {}))
    promise = Promise(workload.ttft_s, workload.tbt_s)

    solution = search.find(promise, workload.objective)
    if solution is None:
        raise infeasible(search, promise)
    candidate, choice = solution.candidate, solution.choice
    found = Finding(candidate, choice, candidate.ttft_s(choice))
    outlook, growth = candidate.outlook, candidate.outlook.growth
    formulas = pricer.formulas(outlook.layout)

    plan = Plan(
        target=target,
        dtype=dtype,
        layout=outlook.layout,
        stages=_stages(candidate.split),
        chunks=chunk_rules(found, pricer),
        page_size=growth.page_size,
        num_pages=growth.pages,
        group_tokens=growth.tokens,
        max_batch=workload.concurrency,
        predicted=predict(found, formulas, pricer),
        memory=memory(found, pricer),
        optimality=Optimality(workload.objective, solution.objective, solution.bound, solution.gap),
        binding=binding(search, found, promise, workload.objective),
        alternatives=alternatives(search, found, promise, workload.objective),
        notes=(
            *remarks(search, found, promise, workload.objective),
            *workload_notes(spec, workload),
            *_sources(cluster, outlook.gpus),
        ),
    )
    wrong = violations(plan, spec, cluster, workload, formulas)
    if wrong:
        raise AssertionError(f"the plan fails its re-check: {'; '.join(wrong)}")
    return Made(plan, formulas)


def _target(cluster: Cluster, target: str | None) -> str:
    if target is None or target == cluster.target:
        return cluster.target
    if target not in TARGETS:
        raise UsageError("unknown target", got=target, do=f"one of {', '.join(TARGETS)}")
    raise UsageError(
        f"the devices of {cluster.name} run {cluster.target}",
        got=target,
        do="leave --target out, or name another cluster",
    )


def _stages(split: tuple[int, ...]) -> tuple[Stage, ...]:
    firsts = [sum(split[:s]) for s in range(len(split))]
    return tuple(
        Stage(f"stage_{s}", first, count)
        for s, (first, count) in enumerate(zip(firsts, split, strict=True))
    )


def _sources(cluster: Cluster, gpus: int) -> Iterator[str]:
    """What it costs, if that is known, and where the figures that weigh most come from."""
    price = cluster.numbers.get("price.device_hour")
    if price is not None:
        yield f"{gpus * price.value:,.2f} USD per hour ({price.source})."
    if cluster.target == "cpu":
        measured = cluster.curves["attention_prefill"].source.startswith(CALIBRATED)
        yield _MEASURED if measured else f"{cluster.name}: {_SHIPPED}"
        return
    curve = cluster.curves["attention_prefill"]
    yield f"Prefill attention at up to {curve.full:.0%} of peak; {curve.source}."


_MEASURED = "Figures measured on this machine by `mnemoc calibrate`."
_SHIPPED = "figures from the cluster file, not measured here; `mnemoc calibrate` measures."
