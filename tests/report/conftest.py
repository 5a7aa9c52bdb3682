"""Plans and their report pages."""

from collections.abc import Callable

import pytest
from mnemoc import pipeline
from mnemoc.artifact import Workload
from mnemoc.codegen import Report, render_report
from mnemoc.planner import make_timeline


@pytest.fixture(scope="session")
def planned() -> pipeline.Planned:
    """Two million tokens, three stages, two KVP groups; with its frontier."""
    workload = Workload(context=2_000_000, ttft_s=120.0, tbt_s=0.05)
    pinned = {"spp": 3, "kvp": 2}
    return pipeline.plan("llama-3-8b", "dgx-h100", workload, pinned=pinned, pareto=True)


@pytest.fixture(scope="session")
def reported() -> Callable[[pipeline.Planned], Report]:
    """reported(planned) → what its page is made from."""

    def collect(planned: pipeline.Planned) -> Report:
        plan, workload = planned.plan, planned.workload
        return Report(
            planned.spec.name,
            planned.cluster.describe(),
            workload,
            plan,
            pipeline.apply(planned)[1],
            make_timeline(plan, workload, planned.formulas),
        )

    return collect


@pytest.fixture(scope="session")
def report(planned: pipeline.Planned, reported: Callable[[pipeline.Planned], Report]) -> Report:
    return reported(planned)


@pytest.fixture(scope="session")
def page(report: Report) -> str:
    """The HTML."""
    return render_report(report)
