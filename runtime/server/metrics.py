"""Prometheus metrics under the names that people's dashboards know, after the prefix `mnemoc:`."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engine import Engine
from ..request import Handle

LABELS = ("model_name", "engine")
LONG_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800)
SHORT_S = (0.001, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Time to first token.", LONG_S),
    "inter_token_latency_seconds": ("Time between tokens.", SHORT_S),
    "request_time_per_output_token_seconds": ("Mean time per token after the first.", SHORT_S),
    "e2e_request_latency_seconds": ("From submission to the last token.", LONG_S),
    "request_queue_time_seconds": ("Waiting for pages.", LONG_S),
    "request_prefill_time_seconds": ("From being scheduled to the first token.", LONG_S),
    "request_decode_time_seconds": ("From the first token to the last.", LONG_S),
}


class Metrics:
    """Counters and gauges read the engine when asked; histograms take each finished request."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._labels = (model, "0")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._histograms = {
            name: Histogram(
                f"mnemoc:{name}", help, LABELS, buckets=buckets, registry=self._registry
            ).labels(*self._labels)
            for name, (help, buckets) in _HISTOGRAMS.items()
        }

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def finished(self, handle: Handle) -> None:
        """Take the times of a request that got all its tokens."""
        times, first, last = self._histograms, handle.token_times_s[0], handle.token_times_s[-1]
        scheduled_s = handle.scheduled_s if handle.scheduled_s is not None else first
        times["time_to_first_token_seconds"].observe(first - handle.submitted_s)
        times["e2e_request_latency_seconds"].observe(last - handle.submitted_s)
        times["request_queue_time_seconds"].observe(scheduled_s - handle.submitted_s)
        times["request_prefill_time_seconds"].observe(first - scheduled_s)
        times["request_decode_time_seconds"].observe(last - first)
        for gap_s in handle.tbt_s:
            times["inter_token_latency_seconds"].observe(gap_s)
        if len(handle.tokens) > 1:
            mean_s = (last - first) / (len(handle.tokens) - 1)
            times["request_time_per_output_token_seconds"].observe(mean_s)

    def collect(self) -> Iterable[Metric]:
        """For the registry: what the engine counts."""
        engine, stats, counts = self._engine, self._engine.stats, self._engine.counts
        swapped_out, swapped_in = engine.swapped
        for name, help, value in (
            ("num_requests_running", "Requests with pages.", engine.num_running),
            ("num_requests_waiting", "Requests that wait for pages.", engine.num_waiting),
            (
                "kv_cache_usage_perc",
                "Fraction of KV pages that requests hold, 1 is all.",
                engine.kv_used_fraction,
            ),
        ):
            gauge = GaugeMetricFamily(f"mnemoc:{name}", help, labels=LABELS)
            gauge.add_metric(self._labels, float(value))
            yield gauge
        for name, help, value in (
            (
                "prompt_tokens",
                "Tokens prefilled: of prompts and, after a preemption, once more.",
                stats.prompt_tokens,
            ),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("request_success", "Requests finished.", stats.finished),
            ("num_preemptions", "Requests that gave their KV pages up.", counts.preemptions),
            (
                "prefix_cache_queries",
                "Prompt tokens that were looked for in KV pages.",
                stats.prefix_queries,
            ),
            ("prefix_cache_hits", "Prompt tokens found in KV pages.", stats.prefix_hits),
            ("kv_pages_swapped_out", "KV pages copied to host memory.", swapped_out),
            ("kv_pages_swapped_in", "KV pages copied back from host memory.", swapped_in),
        ):
            counter = CounterMetricFamily(f"mnemoc:{name}", help, labels=LABELS)
            counter.add_metric(self._labels, float(value))
            yield counter
