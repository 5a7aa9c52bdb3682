"""Prometheus metrics under the names that people's dashboards know, after the prefix `mnemoc:`.

The engine counts (`runtime.telemetry.stats`); here its counts get names, words and labels when somebody
asks. Labels are few: the model, the plan's KVP groups, and fixed words. docs/operating.md says what to
look at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ..engine import Engine
from ..telemetry.machine import Machine
from ..telemetry.tally import Tally
from .chronicle import Chronicle
from .recent import Recent

LABELS = ("model_name", "engine")
HISTOGRAMS = {
    "time_to_first_token_seconds": "From submission to the first token.",
    "inter_token_latency_seconds": "Time between tokens.",
    "request_time_per_output_token_seconds": "Mean time per token after the first.",
    "e2e_request_latency_seconds": "From submission to the last token.",
    "request_queue_time_seconds": "Waiting for pages.",
    "request_prefill_time_seconds": "From having pages to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_inference_time_seconds": "From having pages to the last token.",
    "request_prompt_tokens": "Prompt tokens of finished requests.",
    "request_generation_tokens": "Generated tokens of finished requests.",
    "request_params_max_tokens": "max_tokens of finished requests.",
    "iteration_tokens_total": "Tokens of a micro-batch.",
    "iteration_time_seconds": "A micro-batch, from dispatch to the last reply.",
    "iteration_time_predicted_over_measured": "The plan's prediction of a micro-batch, over its time.",
    "ttft_predicted_over_measured": "TTFT as predicted when the request came, over TTFT.",
}

Samples = Mapping[tuple[str, ...], float]
"""By the values of further labels."""


class Metrics:
    """Reads the engine when asked."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, model: str, recent: Recent | None = None) -> None:
        self._engine = engine
        self._labels = (model, "0")
        self._machine = Machine.of(engine.manifest)
        self._recent = recent or Recent(engine.stats, self._machine)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._chronicle: Chronicle | None = None

    def count_drops(self, chronicle: Chronicle) -> None:
        """Show also what the log lost."""
        self._chronicle = chronicle

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        yield from self._gauges()
        yield from self._counters()
        tallies = self._engine.stats.tallies
        for name, help in HISTOGRAMS.items():
            yield self._histogram(name, help, getattr(tallies, name))

    def _gauges(self) -> Iterator[Metric]:
        engine, plan, machine = self._engine, self._engine.manifest.plan, self._machine
        yield self._gauge("num_requests_running", "Requests with pages.", engine.num_running)
        yield self._gauge("num_requests_waiting", "Requests without pages.", engine.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc",
            "Fraction of KV pages that requests hold, 1 is all.",
            engine.kv_used_fraction,
        )
        pages: dict[tuple[str, ...], float] = {}
        for number, group in enumerate(engine.kv_pages):
            for state, count in dataclasses.asdict(group).items():
                pages[str(number), state] = count
        help = "KV pages of a KVP group: all, held by requests, of them none but found again, on the host."
        yield self._gauge("kv_pages", help, pages, "group", "state")
        yield self._gauge("engine_healthy", "1 while workers are up.", engine.healthy)
        info: Samples = {(str(plan.page_size), str(plan.num_pages)): 1.0}
        help = "The plan's pages: tokens of one, and their number on each KVP group."
        yield self._gauge("cache_config_info", help, info, "block_size", "num_gpu_blocks")
        for name, help, peak in (
            ("peak_flops", "Flops per second of all devices, by the plan.", machine.peak_flops),
            ("peak_bytes", "Bytes per second of all memories, by the plan.", machine.peak_bytes),
        ):
            if peak is not None:
                yield self._gauge(name, help, peak)
        mfu, mbu = self._recent.utilization()
        for name, help, share in (
            ("mfu", "Model flops utilization over the last minute, 1 is all.", mfu),
            ("mbu", "Memory bandwidth utilization over the last minute, 1 is all.", mbu),
        ):
            if share is not None:
                yield self._gauge(name, help, share)

    def _counters(self) -> Iterator[Metric]:
        engine, stats = self._engine, self._engine.stats
        swapped_out, swapped_in = engine.swapped
        for name, help, value in (
            (
                "prompt_tokens",
                "Tokens prefilled: of prompts and, after a preemption, once more.",
                stats.prompt_tokens,
            ),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            (
                "num_preemptions",
                "Requests that gave their KV pages up.",
                engine.counts.preemptions,
            ),
            (
                "num_replays",
                "Requests that went on from their tokens after the workers' death.",
                engine.counts.replays,
            ),
            (
                "prefix_cache_queries",
                "Prompt tokens that were looked for in KV pages.",
                stats.prefix_queries,
            ),
            ("prefix_cache_hits", "Prompt tokens found in KV pages.", stats.prefix_hits),
            ("kv_pages_swapped_out", "KV pages copied to host memory.", swapped_out),
            ("kv_pages_swapped_in", "KV pages copied back from host memory.", swapped_in),
            ("requests_refused", "Refused at once: too late for them.", stats.refused),
            ("late_tokens", "Tokens that came behind their promise.", stats.late_tokens),
            ("worker_failures", "Deaths of the workers, all at once.", stats.deaths),
            ("worker_restarts", "Times that fresh workers were up again.", stats.restarts),
            ("model_flops", "Flops computed.", self._machine.work_flops(stats.work)),
            ("model_read_bytes", "Bytes read.", self._machine.work_bytes(stats.work)),
        ):
            yield self._counter(name, help, value)
        if self._chronicle is not None:
            help = "Events that found no room in the log, or no disk."
            yield self._counter("log_events_lost", help, self._chronicle.missing)
        reasons: Samples = {
            ("stop",): stats.stopped,
            ("length",): stats.finished - stats.stopped,
            ("abort",): stats.cancelled,
            ("error",): stats.failed,
        }
        yield self._counter(
            "request_success", "Requests that are over.", reasons, "finished_reason"
        )
        kept = stats.promises
        outcomes: Samples = {
            ("ttft", "kept"): kept.ttft_kept,
            ("ttft", "missed"): kept.ttft_missed,
            ("tbt", "kept"): kept.tbt_kept,
            ("tbt", "missed"): kept.tbt_missed,
        }
        help = "Promises to requests that are over, but for those who left."
        yield self._counter("request_promises", help, outcomes, "promise", "outcome")
        parts: Samples = {(part,): seconds for part, seconds in vars(stats.parts).items()}
        help = "Seconds that micro-batches took, by what was done."
        yield self._counter("iteration_part_seconds", help, parts, "part")

    def _gauge(self, name: str, help: str, value: float | Samples, *names: str) -> Metric:
        gauge = GaugeMetricFamily(f"mnemoc:{name}", help, labels=(*LABELS, *names))
        for labels, one in _samples(value).items():
            gauge.add_metric((*self._labels, *labels), float(one))
        return gauge

    def _counter(self, name: str, help: str, value: float | Samples, *names: str) -> Metric:
        counter = CounterMetricFamily(f"mnemoc:{name}", help, labels=(*LABELS, *names))
        for labels, one in _samples(value).items():
            counter.add_metric((*self._labels, *labels), float(one))
        return counter

    def _histogram(self, name: str, help: str, tally: Tally) -> Metric:
        buckets, below = [], 0
        for bound, count in zip((*tally.bounds, float("inf")), list(tally.counts), strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(below)))
        histogram = HistogramMetricFamily(f"mnemoc:{name}", help, labels=LABELS)
        histogram.add_metric(self._labels, buckets, tally.sum)
        return histogram


def _samples(value: float | Samples) -> Samples:
    return value if isinstance(value, Mapping) else {(): value}
