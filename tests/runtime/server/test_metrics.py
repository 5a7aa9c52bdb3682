"""What /metrics says, and that the dashboard asks for nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
import psutil
import pytest
from click.testing import CliRunner
from mnemoc.cli import cli
from mnemoc.folder import load_artifact, write_artifact
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.request import Promise
from mnemoc.runtime.server.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families

PEAKS = {
    "peak.float32": {"value": 1e11},
    "memory.bandwidth": {"value": 1e10},
    "devices_per_node": {"value": 8},
}
SAMPLING = Sampling(ignore_eos=True)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(metrics: Metrics) -> Samples:
    """By name and labels, without those that all have."""
    found: Samples = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for one in family.samples:
            labels = {k: v for k, v in one.labels.items() if k not in ("model_name", "engine")}
            found[one.name.removeprefix("mnemoc:"), frozenset(labels.items())] = one.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


@pytest.fixture(scope="module")
def plan(models: Callable[..., Path], plans: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """Two KVP groups, on a machine whose peaks are known."""
    manifest, contents = load_artifact(plans(models("llama"), kvp=2, num_pages=12, context=200))
    folder: Path = tmp_path_factory.mktemp("known") / "plan"
    known = dataclasses.replace(manifest, cluster={"numbers": PEAKS})
    write_artifact(folder, known, {n: d for n, d in contents.items() if n != "manifest.json"})
    return folder


@pytest.fixture(scope="module")
def engine(plan: Path, models: Callable[..., Path], nursery: NurseryProcess) -> Iterator[Engine]:
    with Engine.start(plan, models("llama"), nursery=nursery) as engine:
        yield engine


def test_preemptions_and_swaps_are_counted(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> None:
    """Two requests that need more pages than there are, once they have grown."""
    model = models("llama")
    with Engine.start(plans(model, num_pages=12, context=200), model, nursery=nursery) as engine:
        metrics = Metrics(engine, "llama")
        handles = [engine.submit(Request([7 + i] * 64, 60, SAMPLING)) for i in range(2)]
        for handle in handles:
            handle.result()
        found = samples(metrics)
    assert value(found, "num_preemptions_total") == 1
    assert value(found, "kv_pages_swapped_out_total") == 0, "the plan has no host pages"
    assert value(found, "prompt_tokens_total") > 128, "what is computed again is counted again"
    assert value(found, "prefix_cache_queries_total") == 128, "but not looked for again"
    assert value(found, "kv_cache_usage_perc") == 0
    assert value(found, "request_queue_time_seconds_count") == 2
    assert ("mfu", frozenset()) not in found, "of a machine whose peaks nobody knows"


def test_a_request_is_counted_once_in_each_histogram_and_by_why_it_ended(engine: Engine) -> None:
    metrics = Metrics(engine, "llama")
    before = samples(metrics)
    engine.submit(Request([1] * 100, 8, SAMPLING)).result()
    stopped = engine.submit(Request([2] * 40, 100, SAMPLING))
    next(iter(stopped))
    stopped.stop()
    stopped.result()
    left = engine.submit(Request([3] * 40, 150, SAMPLING))
    next(iter(left))
    left.cancel()
    left.result()
    after = samples(metrics)

    def gained(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    for name in (
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_decode_time_seconds",
    ):
        assert gained(f"{name}_count") == 2, name
    assert gained("time_to_first_token_seconds_count") == 3
    assert gained("request_prompt_tokens_bucket", le="50.0") == 1
    assert gained("request_prompt_tokens_sum") == 140
    assert gained("request_params_max_tokens_sum") == 108
    ends = {"length": 1, "stop": 1, "abort": 1, "error": 0}
    assert {r: gained("request_success_total", finished_reason=r) for r in ends} == ends
    assert gained("request_promises_total", promise="ttft", outcome="kept") == 2
    tokens = gained("generation_tokens_total")
    assert gained("inter_token_latency_seconds_count") == tokens - 3


def test_the_time_of_micro_batches_is_told_by_part_and_against_the_plan(engine: Engine) -> None:
    metrics = Metrics(engine, "llama")
    rows = value(samples(metrics), "iteration_tokens_total_sum")
    engine.submit(Request([4] * 150, 20, SAMPLING)).result()
    deadline_s = time.monotonic() + 20
    while True:  # the last micro-batch is through when its other group has answered too
        found = samples(metrics)
        gained = value(found, "iteration_tokens_total_sum") - rows
        if gained == 150 + 20 - 1 or time.monotonic() > deadline_s:
            break
    assert gained == 150 + 20 - 1
    count = value(found, "iteration_time_seconds_count")
    assert value(found, "iteration_time_predicted_over_measured_count") == count > 20
    parts = ("schedule", "dispatch", "settle", "last_stage", "waiting")
    spent = {part: value(found, "iteration_part_seconds_total", part=part) for part in parts}
    assert all(seconds > 0 for seconds in spent.values())
    walls = value(found, "iteration_time_seconds_sum")
    assert spent["last_stage"] + spent["waiting"] == pytest.approx(walls)
    assert 0 < value(found, "mfu") < 1
    assert value(found, "mbu") > 0
    pages = [value(found, "kv_pages", group=str(g), state="total") for g in range(2)]
    assert pages == [12, 12]


def test_a_promise_that_was_missed_is_counted_and_so_are_its_late_tokens(engine: Engine) -> None:
    metrics = Metrics(engine, "llama")
    before = samples(metrics)
    hurried = Promise(ttft_s=1e-6, tbt_s=1e-6)
    engine.submit(Request([5] * 60, 10, SAMPLING, promise=hurried)).result()
    after = samples(metrics)
    for promise in ("ttft", "tbt"):
        name, labels = "request_promises_total", {"promise": promise, "outcome": "missed"}
        assert value(after, name, **labels) - value(before, name, **labels) == 1
    assert value(after, "late_tokens_total") - value(before, "late_tokens_total") == 9


def test_buckets_hold_a_prompt_of_ten_million_tokens(engine: Engine) -> None:
    found = samples(Metrics(engine, "llama"))
    assert ("time_to_first_token_seconds_bucket", frozenset({("le", "28800.0")})) in found
    assert ("request_prompt_tokens_bucket", frozenset({("le", "10000000.0")})) in found


def test_the_series_are_as_many_after_hundreds_of_requests(engine: Engine) -> None:
    metrics = Metrics(engine, "llama")
    before = set(samples(metrics))
    for handle in [engine.submit(Request([6 + i % 50], 1, SAMPLING)) for i in range(300)]:
        handle.result()
    assert set(samples(metrics)) == before
    began_s = time.thread_time()
    for _ in range(10):
        metrics.render()
    assert (time.thread_time() - began_s) / 10 < 0.1


def test_counters_outlive_the_workers(engine: Engine, nursery: NurseryProcess) -> None:
    metrics = Metrics(engine, "llama")
    engine.submit(Request([1] * 50, 5, SAMPLING)).result()
    before = samples(metrics)
    going_on = engine.submit(Request([1] * 50, 100, SAMPLING))
    next(iter(going_on))
    os.kill(psutil.Process(nursery.process.pid).children()[0].pid, signal.SIGKILL)
    going_on.result()
    after = samples(metrics)
    for (name, labels), count in before.items():
        if name.endswith(("_total", "_count", "_bucket")):
            assert after[name, labels] >= count, name
    generated = value(after, "generation_tokens_total") - value(before, "generation_tokens_total")
    assert generated == 100, "no token counts twice"
    for name in ("worker_failures_total", "worker_restarts_total", "num_replays_total"):
        assert value(after, name) - value(before, name) == 1


# ------------------------------------------------------------------------------ the dashboard


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    made = CliRunner().invoke(cli, ["dashboard"])
    assert made.exit_code == 0
    found: dict[str, Any] = json.loads(made.output)
    return found


def selectors(node: Any) -> Iterator[Any]:
    """Of all metrics in an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    for name in ("expr", "lhs", "rhs"):
        if (inner := getattr(node, name, None)) is not None:
            yield from selectors(inner)
    for inner in getattr(node, "args", ()) or ():
        yield from selectors(inner)


def test_the_dashboard_asks_only_for_what_is_exported(
    dashboard: dict[str, Any], engine: Engine
) -> None:
    engine.submit(Request([1] * 30, 3, SAMPLING)).result()
    exported: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(Metrics(engine, "llama").render().decode()):
        for one in family.samples:
            exported.setdefault(one.name, set()).update(one.labels)
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", "5m").replace("$__range", "1h")
            found = list(selectors(promql_parser.parse(expr.replace("$model", ".*"))))
            assert found, expr
            for one in found:
                assert one.name in exported, one.name
                labels = {matcher.name for matcher in one.matchers.matchers}
                assert "model_name" in labels <= exported[one.name]
                asked.add(one.name)
    assert len(asked) > 25


def test_the_dashboard_can_be_provisioned(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"] and len(dashboard["uid"]) <= 40
    assert "id" not in dashboard, "an id belongs to one Grafana"
    source, model = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert model["datasource"]["uid"] == "${datasource}"
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
