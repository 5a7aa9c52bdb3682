"""Traces, as a collector gets them: a small one that speaks OTLP over HTTP."""

from __future__ import annotations

import http.server
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mnemoc.errors import BadInput
from mnemoc.runtime import Engine
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.server import Options, create_app
from mnemoc.runtime.server.serve import chronicled
from mnemoc.runtime.server.spans import Spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Serving = Callable[..., AbstractContextManager[str]]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Keeps the spans that it is sent; `slow` holds each sender up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.slow = threading.Event()
        self.slow.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        collector: Any = self.server
        collector.slow.wait(10)
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            collector.services |= {
                one.value.string_value
                for one in resource.resource.attributes
                if one.key == "service.name"
            }
            for scope in resource.scope_spans:
                collector.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.slow.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def engine(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> Iterator[Engine]:
    model = models("llama")
    with Engine.start(plans(model, context=600), model, nursery=nursery) as engine:
        yield engine


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_request_is_a_span_in_its_clients_trace_with_its_phases(
    collector: Collector, engine: Engine, serving: Serving
) -> None:
    options = Options(otlp_endpoint=collector.url)
    began_ns = time.time_ns()
    with chronicled(options) as chronicle:
        app = create_app(engine, None, options, None, chronicle)
        with serving(app) as url:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
            body = {"prompt": [5] * 120, "max_tokens": 6, "ignore_eos": True}
            assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).is_success
    ended_ns = time.time_ns()
    assert collector.services == {"mnemoc"}
    by_name = {span.name.partition(" ")[0]: span for span in collector.spans}
    assert list(by_name) == ["queue", "prefill", "decode", "text_completion"]
    whole = by_name["text_completion"]
    assert whole.trace_id.hex() == TRACE and whole.parent_span_id.hex() == PARENT
    phases = [by_name[name] for name in ("queue", "prefill", "decode")]
    assert {span.parent_span_id for span in phases} == {whole.span_id}
    edges = [whole.start_time_unix_nano, *(span.end_time_unix_nano for span in phases)]
    assert [span.start_time_unix_nano for span in phases] == edges[:3]
    assert began_ns <= edges[0] <= edges[1] <= edges[2] <= edges[3] <= ended_ns
    said = attributes(whole)
    assert said["gen_ai.usage.input_tokens"] == 120
    assert said["gen_ai.usage.output_tokens"] == 6
    assert said["gen_ai.request.id"] == "mine"
    assert said["gen_ai.request.model"] == engine.manifest.model["name"]
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]


def test_a_collector_that_hangs_holds_up_no_request(
    collector: Collector, engine: Engine, serving: Serving
) -> None:
    collector.slow.clear()
    options = Options(otlp_endpoint=collector.url)
    with chronicled(options) as chronicle:
        with serving(create_app(engine, None, options, None, chronicle)) as url:
            began_s = time.monotonic()
            for _ in range(20):
                body = {"prompt": [1, 2], "max_tokens": 2, "ignore_eos": True}
                assert httpx.post(f"{url}/v1/completions", json=body).is_success
            assert time.monotonic() - began_s < 5
        collector.slow.set()
    assert len(collector.spans) == 20 * 4


def test_without_opentelemetry_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(BadInput, match=r"not installed; pip install 'mnemoc\[otel\]'"):
        Spans("http://127.0.0.1:1")
