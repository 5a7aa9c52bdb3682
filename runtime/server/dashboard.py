"""A Grafana dashboard of a server's metrics, as JSON: to be imported, or provisioned as a file.

Every expression asks for a model (or all) at the datasource that the viewer chooses. Panels fill rows of 24
columns in the order in which they stand here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

UID = "mnemoc-serve"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 8
MINE = '{model_name=~"$model"}'


@dataclass(frozen=True)
class Panel:
    """queries: (PromQL, legend); unit: Grafana's name for it; kind: of panel; width: in columns"""

    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    most: float | None = None
    stacked: bool = False


def _rate(name: str, by: str = "", more: str = "") -> str:
    chosen = f'{{model_name=~"$model"{more}}}'
    return f"sum{by}(rate(mnemoc:{name}{chosen}[$__rate_interval]))"


def _percentiles(name: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (
            f"histogram_quantile({percent / 100}, {_rate(name + '_bucket', ' by (le) ')})",
            f"p{percent}",
        )
        for percent in (50, 90, 99)
    )


def _kept(promise: str) -> str:
    promised = f', promise="{promise}"'
    kept = _rate("request_promises_total", more=promised + ', outcome="kept"')
    return f"{kept} / {_rate('request_promises_total', more=promised)}"


PANELS = (
    Panel(
        "Promises kept",
        "Share of requests whose first token, and all of whose later ones, came in time.",
        ((_kept("ttft"), "TTFT"), (_kept("tbt"), "TBT")),
        "percentunit",
        most=1,
    ),
    Panel(
        "Time to first token",
        "From submission. Prompts of millions of tokens take minutes to hours: see their lengths below.",
        _percentiles("time_to_first_token_seconds"),
        "s",
    ),
    Panel("Time between tokens", "", _percentiles("inter_token_latency_seconds"), "s"),
    Panel(
        "Requests",
        "Running: with pages. Waiting: for pages.",
        (
            (f"sum(mnemoc:num_requests_running{MINE})", "running"),
            (f"sum(mnemoc:num_requests_waiting{MINE})", "waiting"),
        ),
    ),
    Panel(
        "Tokens per second",
        "",
        (
            (_rate("prompt_tokens_total"), "prefilled"),
            (_rate("generation_tokens_total"), "generated"),
        ),
    ),
    Panel(
        "Requests over, per second",
        "stop and length: answered; abort: the client left; error: failed.",
        ((_rate("request_success_total", " by (finished_reason) "), "{{finished_reason}}"),),
        "reqps",
        stacked=True,
    ),
    Panel(
        "MFU and MBU",
        "Of the peaks that the plan's cluster file names; empty where it names none.",
        (
            (f"avg(mnemoc:mfu{MINE})", "flops"),
            (f"avg(mnemoc:mbu{MINE})", "memory bandwidth"),
        ),
        "percentunit",
        most=1,
    ),
    Panel(
        "A micro-batch by part",
        "Seconds of a micro-batch: in the engine's thread, in the last stage, and waiting for other stages.",
        (
            (
                f"{_rate('iteration_part_seconds_total', ' by (part) ')} / ignoring(part) group_left "
                f"{_rate('iteration_time_seconds_count')}",
                "{{part}}",
            ),
        ),
        "s",
        stacked=True,
    ),
    Panel(
        "Predicted over measured",
        "1: as predicted. Below: slower than that. TTFT is predicted as a request comes.",
        (
            (
                f"{_rate('iteration_time_predicted_over_measured_sum')} / "
                f"{_rate('iteration_time_predicted_over_measured_count')}",
                "micro-batch, mean",
            ),
            (
                f"histogram_quantile(0.5, "
                f"{_rate('ttft_predicted_over_measured_bucket', ' by (le) ')})",
                "TTFT, median",
            ),
        ),
    ),
    Panel(
        "KV pages held",
        "Of each KVP group.",
        (
            (
                'sum by (group) (mnemoc:kv_pages{model_name=~"$model", state="held"}) / '
                'sum by (group) (mnemoc:kv_pages{model_name=~"$model", state="total"})',
                "group {{group}}",
            ),
            (f"avg(mnemoc:kv_cache_usage_perc{MINE})", "all"),
        ),
        "percentunit",
        most=1,
    ),
    Panel(
        "Prefix cache hits",
        "Share of prompt tokens that were found in pages.",
        (
            (
                f"{_rate('prefix_cache_hits_total')} / {_rate('prefix_cache_queries_total')}",
                "hits",
            ),
        ),
        "percentunit",
        most=1,
    ),
    Panel(
        "Preemptions and swaps, per second",
        "",
        (
            (_rate("num_preemptions_total"), "preemptions"),
            (_rate("kv_pages_swapped_out_total"), "pages to the host"),
            (_rate("kv_pages_swapped_in_total"), "pages back"),
        ),
    ),
    Panel(
        "Where requests spend their time",
        "Means: waiting for pages, prefill, decode.",
        tuple(
            (f"{_rate(f'{name}_sum')} / {_rate(f'{name}_count')}", part)
            for name, part in (
                ("request_queue_time_seconds", "queue"),
                ("request_prefill_time_seconds", "prefill"),
                ("request_decode_time_seconds", "decode"),
            )
        ),
        "s",
        stacked=True,
    ),
    Panel("Prompt tokens of requests", "", _percentiles("request_prompt_tokens")),
    Panel(
        "Workers",
        "Healthy is 1; deaths, restarts and requests that went on after them in the range shown.",
        (
            (f"min(mnemoc:engine_healthy{MINE})", "healthy"),
            (f"sum(increase(mnemoc:worker_failures_total{MINE}[$__range]))", "deaths"),
            (f"sum(increase(mnemoc:worker_restarts_total{MINE}[$__range]))", "restarts"),
            (f"sum(increase(mnemoc:num_replays_total{MINE}[$__range]))", "requests went on"),
        ),
        kind="stat",
    ),
)


def dashboard() -> str:
    """The dashboard's JSON."""
    return json.dumps(
        {
            "uid": UID,
            "title": "mnemoc serve",
            "tags": ["mnemoc", "llm"],
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "timezone": "browser",
            "annotations": {"list": []},
            "templating": {"list": [_datasource(), _model()]},
            "panels": _placed(),
        },
        indent=1,
    )


def _placed() -> list[dict[str, Any]]:
    panels, x, y = [], 0, 0
    for id, panel in enumerate(PANELS, 1):
        if x + panel.width > COLUMNS:
            x, y = 0, y + HEIGHT
        panels.append(_panel(id, panel, x, y))
        x += panel.width
    return panels


def _panel(id: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom = {"fillOpacity": 30 if panel.stacked else 0, "lineWidth": 2, "stacking": stacking}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        defaults["custom"] = custom
    return {
        "id": id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": expr,
                "legendFormat": legend,
            }
            for i, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }


def _model() -> dict[str, Any]:
    query = "label_values(mnemoc:num_requests_running, model_name)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "model"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }
