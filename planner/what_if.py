"""What if: a question that is priced once and then solved for any promise, in milliseconds.

    question = WhatIf(load_model("llama-3-70b"), load_cluster("dgx-h100"), workload, nodes=16)
    question.solve()                             the workload's own promise
    question.solve(ttft_s=30, gpus=256)          another one; more devices than the cluster has are fine

A solution is exact: layouts by branch and bound, splits one by one, chunks by thresholds
(`search`, `candidate`). `make_plan` lets the solver prove the same optimum on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..alternatives import Point
from ..artifact import AUTO, Precision, Workload
from ..errors import BadInput, UsageError
from ..ir.model import ModelSpec
from ..layout import Layout
from .cluster import TARGETS, Cluster
from .precision import check_precision
from .price import Pricer
from .search import Finding, Promise, Search
from .space import Pins, check_pins, devices_asked
from .workload import OBJECTIVES, check_workload


@dataclass(frozen=True)
class Answer:
    """The best plan for one promise.

    tbt_s: what decodes see, as a plan predicts it; kept_tbt_s: the least TBT promise that it keeps, beside
    a prefill too; objective: in devices, seconds of TTFT, or tokens/s, as `minimised` says
    """

    layout: Layout
    layers: tuple[int, ...]
    ttft_s: float
    tbt_s: float
    kept_tbt_s: float
    tokens_per_s: float
    minimised: str
    objective: float

    @property
    def gpus(self) -> int:
        return self.layout.gpus

    @property
    def point(self) -> Point:
        return Point(self.layout, self.gpus, self.ttft_s, self.kept_tbt_s)


class WhatIf:
    """One model, cluster and workload; `promise` is what the workload asks."""

    def __init__(
        self,
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
    ) -> None:
        """nodes, gpus: most that may be used; target: the cluster's by default; pinned: of the layout;
        precision: of weights and KV cache; eager: as in `artifact.Plan`.

        BadInput and UsageError say what about the question makes no sense.
        """
        check_workload(workload)
        self.spec, self.cluster, self.workload = spec, cluster, workload
        self.target = _target(cluster, target)
        self.dtype = "float32" if self.target == "cpu" else spec.dtype
        self.precision, self.eager = check_precision(cluster, precision), eager
        self.pinned = dict(pinned or {})
        devices = devices_asked(cluster, nodes=nodes, gpus=gpus)
        self.degrees = check_pins(spec, cluster, devices, self.pinned)
        self.promise = Promise(workload.ttft_s, workload.tbt_s, devices)
        reduce = self.pinned.get("all_reduce")
        pricer = Pricer(
            spec,
            cluster,
            self.dtype,
            workload,
            precision,
            eager=eager,
            overlap=self.pinned.get("overlap"),
            all_reduce=None if reduce is None else str(reduce),
        )
        self.search = Search(pricer, self.pinned)
        self.search.layouts(devices)

    def pinning(self, more: Pins) -> WhatIf:
        """The same question with more of the layout pinned."""
        return WhatIf(
            self.spec,
            self.cluster,
            self.workload,
            gpus=self.promise.devices,
            target=self.target,
            pinned={**self.pinned, **more},
            precision=self.precision,
            eager=self.eager,
        )

    def solve(
        self,
        *,
        ttft_s: float | None = None,
        tbt_s: float | None = None,
        gpus: int | None = None,
        objective: str | None = None,
    ) -> Answer | None:
        """The best plan where these take the place of the workload's; None if no plan keeps them.

        math.inf lifts a time. BadInput if a time or a count is not positive, or the objective unknown.
        """
        for name, value in (("ttft_s", ttft_s), ("tbt_s", tbt_s), ("gpus", gpus)):
            if value is not None and (math.isnan(value) or value <= 0):
                raise BadInput(f"{name} must be positive", got=value)
        asked = self.promise
        promise = Promise(
            asked.ttft_s if ttft_s is None else ttft_s,
            asked.tbt_s if tbt_s is None else tbt_s,
            asked.devices if gpus is None else gpus,
        )
        minimised = self.workload.objective if objective is None else objective
        if minimised not in OBJECTIVES:
            raise BadInput("unknown objective", got=minimised, do=f"one of {', '.join(OBJECTIVES)}")
        found = self.search.incumbent(promise, minimised)
        return None if found is None else self.answer(found, minimised)

    def answer(self, found: Finding, minimised: str) -> Answer:
        """A finding in figures."""
        outlook = found.outlook
        rate = self.workload.concurrency / outlook.decode_s
        value = {"gpus": float(outlook.gpus), "ttft": found.ttft_s, "throughput": rate}[minimised]
        return Answer(
            outlook.layout,
            found.candidate.split,
            found.ttft_s,
            found.tbt_s,
            found.kept_tbt_s,
            rate,
            minimised,
            value,
        )


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
