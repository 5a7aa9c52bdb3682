"""The plan against brute force: every layout × growth × split × chunk vector, enumerated."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Workload
from mnemoc.errors import Infeasible
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.planner import Cluster, WhatIf, load_cluster, plan_of
from mnemoc.planner.candidate import best_chunks, make_candidate
from mnemoc.planner.milp import Problem, solve
from mnemoc.planner.outlook import Outlook
from mnemoc.planner.price import Pricer
from mnemoc.planner.space import growths, layouts

from .test_space import compositions

Option = tuple[float, float, float]  # gpus, −tokens/s, TTFT


def every_option(pricer: Pricer, devices: int) -> Iterator[tuple[Outlook, Option]]:
    """Each layout, growth, composition of the layers and chunk vector that keeps TBT and memory."""
    workload, usable = pricer.workload, pricer.cluster.usable_bytes
    for layout in layouts(pricer.spec, pricer.cluster, devices, {}):
        for growth in growths(layout, workload, {}):
            outlook = pricer.outlook(layout, growth)
            if outlook.decode_s > workload.tbt_s:
                continue
            for split in compositions(pricer.spec.num_layers, layout.spp):
                candidate = make_candidate(outlook, split, workload.tbt_s, usable)
                menus = [np.flatnonzero(row) for row in candidate.allowed]
                for choice in itertools.product(*menus):
                    ttft_s = candidate.ttft_s(np.array(choice))
                    if ttft_s <= workload.ttft_s:
                        rate = workload.concurrency / outlook.decode_s
                        yield outlook, (outlook.gpus, -rate, ttft_s)


def best_option(options: list[Option], objective: str) -> Option:
    order = {"gpus": (0, 2), "throughput": (1, 2), "ttft": (2,)}[objective]
    return min(options, key=lambda option: tuple(option[i] for i in order))


@settings(max_examples=220, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    context=st.integers(200, 3000),
    ttft_s=st.sampled_from([0.05, 0.2, 0.5, 2.0]),
    tbt_s=st.sampled_from([0.02, 0.1, 0.5]),
    concurrency=st.integers(1, 3),
    objective=st.sampled_from(["gpus", "ttft", "throughput"]),
    layers=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 1, 4]),
    devices=st.integers(1, 8),
    peak=st.sampled_from([2e10, 1e11, 1e12]),
    bandwidth=st.sampled_from([3e9, 1e10]),
    capacity=st.sampled_from([1.01e8, 1.3e8, 1e9]),
)
def test_the_plan_is_the_best_of_all_plans(
    context: int,
    ttft_s: float,
    tbt_s: float,
    concurrency: int,
    objective: str,
    layers: int,
    kv_heads: int,
    devices: int,
    peak: float,
    bandwidth: float,
    capacity: float,
) -> None:
    from .conftest import small_cluster, small_model

    machine = small_cluster(
        peak__float32=peak, memory__bandwidth=bandwidth, memory__capacity=capacity
    )
    spec = small_model(num_layers=layers, num_kv_heads=kv_heads, vocab=4096)
    workload = Workload(context, ttft_s, tbt_s, 16, concurrency, objective)
    question = WhatIf(spec, machine, workload, gpus=devices)
    pricer = question.search.pricer
    assume(math.prod(pricer.grid.shape) <= 32)
    options = [option for _, option in every_option(pricer, devices)]
    if not options:
        with pytest.raises(Infeasible):
            plan_of(question)
        return
    gpus, rate, best_ttft_s = best_option(options, objective)
    plan = plan_of(question).plan
    assert plan.optimality.gap <= 1e-6
    assert plan.optimality.minimised == objective
    assert plan.predicted.ttft_s == pytest.approx(best_ttft_s, rel=1e-5)
    if objective == "gpus":
        assert plan.gpus == gpus == plan.optimality.objective
    elif objective == "throughput":
        assert plan.predicted.throughput_tokens_per_s == pytest.approx(-rate)
        assert plan.optimality.objective == pytest.approx(-rate)
    else:
        assert plan.optimality.objective == pytest.approx(best_ttft_s, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from(["llama-3-8b", "qwen2.5-7b"]),
    context=st.integers(500, 3_000_000),
    concurrency=st.integers(1, 40),
    devices=st.integers(1, 40),
    stripe=st.sampled_from([None, 4096, "contiguous"]),
)
def test_no_growth_of_a_layout_is_quicker_than_the_bounds_that_the_search_discards_it_by(
    model: str, context: int, concurrency: int, devices: int, stripe: int | str | None
) -> None:
    workload = Workload(context, 10.0, 0.3, 16, concurrency, "ttft")
    spec, machine = load_model(model), load_cluster("dgx-h100")
    pricer = Pricer(spec, machine, "bfloat16", workload)
    pinned = {} if stripe is None else {"stripe": stripe}
    space = layouts(spec, machine, devices, pinned)
    for layout, tbt_s, ttft_s in zip(space, *pricer.bounds(space), strict=True):
        for growth in growths(layout, workload, pinned):
            outlook = pricer.outlook(layout, growth)
            assert tbt_s <= outlook.decode_s * (1 + 1e-9)
            assert ttft_s <= outlook.floor_s * (1 + 1e-9)


def test_the_solver_agrees_with_exact_search_where_nothing_is_pruned(
    cluster: Callable[..., Cluster], model: Callable[..., ModelSpec]
) -> None:
    """All candidates of a small space go to HiGHS with their full menus."""
    workload = Workload(12_000, 10.0, 0.3, 16, 2, "ttft")
    machine, spec = cluster(), model()
    pricer = Pricer(spec, machine, "float32", workload)
    candidates = [
        make_candidate(outlook, split, workload.tbt_s, machine.usable_bytes)
        for layout in layouts(spec, machine, 4, {})
        for growth in growths(layout, workload, {})
        for outlook in [pricer.outlook(layout, growth)]
        if outlook.decode_s <= workload.tbt_s
        for split in outlook.splits()
    ]
    possible = [c for c in candidates if best_chunks(c) is not None]
    limits = tuple(workload.ttft_s for _ in possible)
    problem = Problem(
        "ttft", tuple(possible), limits, workload.ttft_s, workload.tbt_s, machine.usable_bytes, 4
    )
    solution = solve(problem)
    assert solution is not None
    exact = min(best[0] for c in possible if (best := best_chunks(c)) is not None)
    assert solution.objective == pytest.approx(exact, rel=1e-5)
    assert solution.candidate.ttft_s(solution.choice) == pytest.approx(exact, rel=1e-5)
    assert solution.bound <= solution.objective * (1 + 1e-9)


@pytest.mark.parametrize("name", ["ttft", "tbt", "memory", "devices"])
def test_each_row_of_the_program_binds_where_it_is_asked_to(name: str) -> None:
    """Candidates that know of no promise: what HiGHS chooses under one equals exact search under it."""
    from .conftest import small_cluster, small_model

    spec, machine = small_model(), small_cluster()
    pricer = Pricer(spec, machine, "float32", Workload(12_000, 1e4, 1e4, 16, 2))
    loose = Problem("gpus", (), (), 100.0, 1e3, 10**12, 4)
    tight = {
        "ttft": dataclasses.replace(loose, ttft_s=4.0),
        "tbt": dataclasses.replace(loose, tbt_s=0.05),
        "memory": dataclasses.replace(loose, usable_bytes=112_000_000),
        "devices": dataclasses.replace(loose, objective="ttft", devices=2),
    }[name]
    chosen = []
    for asked in (dataclasses.replace(loose, objective=tight.objective), tight):
        usable = asked.usable_bytes
        free, kept = (
            [
                make_candidate(outlook, split, tbt_s, usable_bytes)
                for layout in layouts(spec, machine, 4, {})
                for growth in growths(layout, pricer.workload, {})
                for outlook in [pricer.outlook(layout, growth)]
                for split in outlook.splits()
            ]
            for tbt_s, usable_bytes in ((math.inf, 10**12), (asked.tbt_s, usable))
        )
        within = [c for c in free if (best := best_chunks(c)) and best[0] <= asked.ttft_s]
        problem = dataclasses.replace(
            asked, candidates=tuple(within), limits=tuple(asked.ttft_s for _ in within)
        )
        solution = solve(problem)
        assert solution is not None
        exact = min(
            (c.outlook.gpus if asked.objective == "gpus" else 0, best[0])
            for c in kept
            if c.outlook.gpus <= asked.devices
            and (best := best_chunks(c)) is not None
            and best[0] <= asked.ttft_s
        )
        found = solution.candidate
        gpus = found.outlook.gpus if asked.objective == "gpus" else 0
        assert (gpus, found.ttft_s(solution.choice)) == pytest.approx(exact, rel=1e-5)
        chosen.append(exact)
    assert chosen[1] > chosen[0], "it binds: without it there is better"
