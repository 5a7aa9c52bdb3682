"""The frontier: no point dominates another, and none could be better in any figure."""

import io
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.alternatives import Frontier, Point
from mnemoc.artifact import Workload
from mnemoc.planner import WhatIf, frontier
from mnemoc.planner.frontier import STEP
from mnemoc.planner.render_frontier import render_frontier
from rich.console import Console

from .conftest import small_cluster, small_model


def question(context: int, tbt_s: float, concurrency: int, capacity: float = 1e9) -> WhatIf:
    workload = Workload(context, 1.0, tbt_s, 16, concurrency)
    return WhatIf(small_model(), small_cluster(memory__capacity=capacity), workload)


def figures(point: Point) -> tuple[float, float, float]:
    return point.gpus, point.ttft_s, point.tbt_s


@settings(max_examples=15, deadline=None)
@given(
    context=st.integers(500, 60_000),
    tbt_s=st.floats(0.005, 0.2),
    concurrency=st.integers(1, 3),
    capacity=st.sampled_from([1.3e8, 1e9]),
)
def test_every_point_can_be_had_and_none_of_its_figures_can_be_bettered(
    context: int, tbt_s: float, concurrency: int, capacity: float
) -> None:
    asked = question(context, tbt_s, concurrency, capacity)
    edge = frontier(asked)
    for one, other in itertools.permutations(edge.points, 2):
        assert any(a < b for a, b in zip(figures(one), figures(other), strict=True))
    for gpus, ttft_s, kept_s in map(figures, edge.points):
        had = asked.solve(gpus=int(gpus), ttft_s=ttft_s, tbt_s=kept_s, objective="gpus")
        assert had is not None and had.gpus == gpus, "not on fewer GPUs"
        assert asked.solve(gpus=int(gpus), ttft_s=ttft_s * (1 - 1e-6), tbt_s=kept_s) is None
        assert asked.solve(gpus=int(gpus), ttft_s=ttft_s, tbt_s=kept_s * (1 - 1e-6)) is None


def test_nothing_that_a_promise_allows_is_missing_from_it() -> None:
    """At each level, so many GPUs do no better than the frontier says, but for its step."""
    asked = question(30_000, 0.02, 2)
    edge = frontier(asked)
    assert asked.promise.tbt_s in edge.tbt_s
    for tbt_s in edge.tbt_s:
        for gpus in range(1, 9):
            best = asked.solve(gpus=gpus, ttft_s=1e9, tbt_s=tbt_s, objective="ttft")
            said = [p.ttft_s for p in edge.points if p.gpus <= gpus and p.tbt_s <= tbt_s]
            if best is None:
                assert not said
            else:
                assert best.ttft_s * (1 - 1e-9) <= min(said) <= best.ttft_s / (1 - STEP)


def test_a_cluster_that_is_too_small_has_an_empty_frontier() -> None:
    assert frontier(question(60_000, 0.1, 3, capacity=1.01e8)).points == ()


def table(edge: Frontier, workload: Workload) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(render_frontier(edge, workload))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_80_columns_and_marks_without_colours() -> None:
    asked = question(30_000, 0.02, 1)
    text = table(frontier(asked), asked.workload)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "promised" in text
    assert "✓" in text.split("keeps both promises")[0].replace("✓ keeps", "")
    assert "…" not in text
