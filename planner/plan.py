"""The planner's door: model, cluster and promise → the plan, proven and re-checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..artifact import AUTO, NEVER_HALVED, Optimality, Plan, Precision, Stage, Workload
from ..ir.model import ModelSpec
from ..speeds import Swap
from .check import violations
from .cluster import CALIBRATED, Cluster
from .explain import (
    alternatives,
    binding,
    dealing,
    halves_lose,
    marginals,
    overlapping,
    summing,
    why,
)
from .formulas import StageFormulas
from .frontier import frontier
from .infeasible import infeasible
from .precision import precision_notes
from .predict import chunk_rules, memory, predict
from .room import host_pages, room, swap_of
from .search import Finding
from .space import Pins
from .what_if import WhatIf
from .workload import workload_notes


@dataclass(frozen=True)
class Made:
    """A plan, and what priced it: formulas, block → part → seconds (see `cost`); swap: copies of pages."""

    plan: Plan
    formulas: StageFormulas
    swap: Swap | None


def make_plan(
    spec: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    target: str | None = None,
    pinned: Pins | None = None,
    precision: Precision = AUTO,
    eager: bool = False,
    pareto: bool = False,
) -> Made:
    """The optimal plan for a promise.

    nodes, gpus: most that may be used; target: the cluster's by default; pinned: of the layout;
    precision: of weights and KV cache; eager: as in `artifact.Plan`; pareto: with the frontier of GPUs,
    TTFT and TBT.
    Infeasible names the binding constraint and the nearest promise and cluster that can be kept; BadInput
    and UsageError say what about the question makes no sense.
    """
    question = WhatIf(
        spec,
        cluster,
        workload,
        nodes=nodes,
        gpus=gpus,
        target=target,
        pinned=pinned,
        precision=precision,
        eager=eager,
    )
    return plan_of(question, pareto=pareto)


def plan_of(question: WhatIf, *, pareto: bool = False) -> Made:
    """The optimal plan for a question's own promise, proven by the solver; see `make_plan`."""
    spec, cluster, workload = question.spec, question.cluster, question.workload
    search, promise, pricer = question.search, question.promise, question.search.pricer
    solution = search.find(promise, workload.objective)
    edge = frontier(question) if pareto else None
    if solution is None:
        raise infeasible(question, edge)
    candidate, choice = solution.candidate, solution.choice
    found = Finding(candidate, choice, candidate.ttft_s(choice))
    if "overlap" not in question.pinned and halves_lose(search, found):
        return plan_of(question.pinning({"overlap": NEVER_HALVED}), pareto=pareto)
    outlook, growth = candidate.outlook, candidate.outlook.growth
    formulas = pricer.formulas(outlook.layout)
    left = room(found, cluster)

    plan = Plan(
        target=question.target,
        dtype=question.dtype,
        layout=outlook.layout,
        stages=_stages(candidate.split),
        chunks=chunk_rules(found, pricer),
        page_size=growth.page_size,
        num_pages=growth.pages + left.pages,
        stripe_tokens=growth.stripe,
        max_batch=left.max_batch,
        max_rows=left.max_rows,
        predicted=predict(found, formulas, pricer),
        memory=memory(found, pricer, left),
        optimality=Optimality(workload.objective, solution.objective, solution.bound, solution.gap),
        binding=binding(search, found, promise, workload.objective),
        alternatives=alternatives(search, found, promise, workload.objective),
        marginals=tuple(marginals(question, found)),
        frontier=edge,
        notes=(
            why(search, found, promise, workload.objective),
            *dealing(search, found, promise),
            *overlapping(search, found),
            *summing(search, found),
            *workload_notes(spec, workload),
            *precision_notes(cluster, question.precision),
            *_sources(cluster, outlook.gpus),
        ),
        precision=question.precision,
        eager=question.eager,
        host_pages=host_pages(found, cluster),
        overlap_rows=outlook.overlap_rows,
        one_shot_rows=pricer.one_shot_rows(outlook.layout),
    )
    wrong = violations(plan, spec, cluster, workload, formulas)
    if wrong:
        raise AssertionError(f"the plan fails its re-check: {'; '.join(wrong)}")
    return Made(plan, formulas, swap_of(plan, cluster, outlook.footprint))


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
        measured = CALIBRATED in cluster.curves["attention_prefill"].source
        yield _MEASURED if measured else f"{cluster.name}: {_SHIPPED}"
        return
    curve = cluster.curves["attention_prefill"]
    yield f"Prefill attention at up to {curve.full:.0%} of peak; {curve.source}."


_MEASURED = "Figures measured on this machine by `mnemoc calibrate`."
_SHIPPED = "figures from the cluster file, not measured here; `mnemoc calibrate` measures."
