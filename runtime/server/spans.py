"""Traces: a span for each request, with its queue, prefill and decode, sent to an OpenTelemetry collector.

Names are those of the GenAI semantic conventions, and vLLM's for what these lack. Spans are made once a
request is over, in the chronicle's thread, and sent by the SDK's own, which drops what it cannot hold.
Prompts and answers are in none of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import BadInput
from ..request import Origin
from .chronicle import Account, Entry

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

NS = 1_000_000_000
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


def configured(endpoint: str | None) -> bool:
    """Whether somebody wants traces: by option, or by OpenTelemetry's own environment."""
    return bool(endpoint or os.environ.get(TRACES_ENDPOINT) or os.environ.get(ENDPOINT))


class Spans:
    """Makes spans of requests that ended. endpoint: a collector's, for OTLP over HTTP"""

    def __init__(self, endpoint: str | None) -> None:
        """BadInput where the packages are not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise BadInput(
                "traces need OpenTelemetry, which is not installed",
                where="--otlp-endpoint",
                do="pip install 'mnemoc[otel]'",
            ) from error
        self.lost = 0  # those that a collector did not take, only the SDK knows
        url = None if endpoint is None else endpoint.rstrip("/") + "/v1/traces"
        exporter: SpanExporter = OTLPSpanExporter(endpoint=url)
        name = os.environ.get("OTEL_SERVICE_NAME", "mnemoc")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer: Tracer = self._provider.get_tracer("mnemoc")

    def write(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.event == "ended" and entry.account is not None:
                self._span(entry.account, entry.time_s - entry.account.now_s)

    def close(self) -> None:
        self._provider.shutdown()

    def _span(self, account: Account, epoch_s: float) -> None:
        """epoch_s: Unix time at the origin of the account's clock"""
        from opentelemetry import trace

        def at(time_s: float) -> int:
            return int((time_s + epoch_s) * NS)

        span = self._tracer.start_span(
            f"{account.origin.operation} {account.origin.model}",
            context=_parent(account.origin),
            kind=trace.SpanKind.SERVER,
            attributes=attributes(account),
            start_time=at(account.submitted_s),
        )
        if account.error:
            span.set_status(trace.Status(trace.StatusCode.ERROR, account.error))
        inside = trace.set_span_in_context(span)
        marks = (account.submitted_s, account.scheduled_s, account.first_token_s)
        begun = [mark for mark in marks if mark is not None]
        ends = (*begun[1:], account.now_s)
        for name, begin_s, end_s in zip(("queue", "prefill", "decode"), begun, ends, strict=False):
            child = self._tracer.start_span(name, context=inside, start_time=at(begin_s))
            child.end(at(end_s))
        span.end(at(account.now_s))


def attributes(account: Account) -> dict[str, Any]:
    """What a request's span says."""
    end_s = account.now_s
    known: dict[str, Any] = {
        "gen_ai.operation.name": account.origin.operation,
        "gen_ai.provider.name": "mnemoc",
        "gen_ai.request.model": account.origin.model,
        "gen_ai.response.model": account.origin.model,
        "gen_ai.request.id": account.origin.id,
        "gen_ai.request.max_tokens": account.max_tokens,
        "gen_ai.request.temperature": account.temperature,
        "gen_ai.request.top_p": account.top_p,
        "gen_ai.usage.input_tokens": account.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": account.cached_tokens,
        "gen_ai.usage.output_tokens": account.generated_tokens,
        "gen_ai.response.finish_reasons": [account.finish],
        "gen_ai.latency.e2e": end_s - account.submitted_s,
        "mnemoc.promise.ttft": account.deadline_s,
        "mnemoc.promise.ttft_kept": account.in_time,
        "mnemoc.late_tokens": account.late_tokens,
        "mnemoc.preemptions": account.preemptions,
    }
    if account.predicted_ttft_s is not None:
        known["mnemoc.predicted_ttft"] = account.predicted_ttft_s
    if account.scheduled_s is not None:
        known["gen_ai.latency.time_in_queue"] = account.scheduled_s - account.submitted_s
        if account.first_token_s is not None:
            known["gen_ai.latency.time_to_first_token"] = account.ttft_s
            prefill_s = account.first_token_s - account.scheduled_s
            known["gen_ai.latency.time_in_model_prefill"] = prefill_s
            known["gen_ai.latency.time_in_model_decode"] = end_s - account.first_token_s
    if account.error:
        known["error.type"] = "engine"
    return known


def _parent(origin: Origin) -> Any:
    """The trace that the client is in, if it says so in W3C's words."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": origin.traceparent or "", "tracestate": origin.tracestate or ""}
    return TraceContextTextMapPropagator().extract(carrier)
