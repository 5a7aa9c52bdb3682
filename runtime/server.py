"""The OpenAI-compatible HTTP server over an engine.

    /v1/completions  /v1/chat/completions  /v1/models  /health  /metrics

Streams are server-sent events; while a prompt prefills, comments in them tell how far it is (clients
that do not know comments skip them). When a client goes away, its requests are cancelled at once.
Conversations are turned into text in a plain form (`api.chat_text`), not by the model's template.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ..errors import BadInput, MnemocError
from .answers import Answers
from .api import ChatBody, CompletionBody
from .engine import Engine
from .metrics import Metrics
from .policies import DEFAULT
from .replies import ChatShape, CompletionShape, EventStream, Shape, gather
from .tokenizer import FILE, Tokenizer

log = logging.getLogger("mnemoc.server")
DRAIN_S = 5
"""How long streams may go on after the server is told to stop."""


def serve(
    directory: Path,
    weights: Path,
    host: str,
    port: int,
    *,
    progress: Callable[[str], None] | None = None,
    policy: str = DEFAULT.name,
    prefix_caching: bool = True,
    trace_out: Path | None = None,
) -> None:
    """Serve a plan until interrupted. The port is taken before any worker starts.

    policy, prefix_caching, trace_out: as for `Engine.start`
    Raises BadInput for a port that cannot be had, and whatever `Engine.start` raises.
    """
    say = progress or (lambda message: None)
    with bind(host, port) as listener:
        tokenizer = Tokenizer(weights) if (weights / FILE).is_file() else None
        with Engine.start(
            directory,
            weights,
            progress=progress,
            policy=policy,
            prefix_caching=prefix_caching,
            trace_out=trace_out,
        ) as engine:
            name, where = listener.getsockname()[:2]
            say(f"serving on http://{name}:{where}/v1")
            config = uvicorn.Config(
                create_app(engine, tokenizer),
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=DRAIN_S,
            )
            uvicorn.Server(config).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, or a sentence that says why not."""
    where = f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise BadInput("a port lies in 0..65535", got=port)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except socket.gaierror as error:
        raise BadInput("no such host", where=where, do="give an address of this machine") from error
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise BadInput(
            f"cannot listen: {reason}", where=where, do="choose another --port"
        ) from error


def create_app(engine: Engine, tokenizer: Tokenizer | None) -> FastAPI:
    """The application, over a running engine. Without a tokenizer prompts are token ids."""
    app = FastAPI(title="mnemoc", docs_url=None, redoc_url=None)
    model = str(engine.manifest.model["name"])
    metrics = Metrics(engine, model)
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.healthy else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        context = engine.manifest.workload.context
        entry = {"id": model, "object": "model", "created": started, "owned_by": "mnemoc"}
        return {"object": "list", "data": [{**entry, "max_model_len": context}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Any:
        return await answer(body, CompletionShape(model), http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Any:
        return await answer(body, ChatShape(model), http)

    async def answer(body: CompletionBody | ChatBody, shape: Shape, http: HttpRequest) -> Any:
        if body.model not in (None, model):
            text = f"the model {body.model!r} is not served here; it is {model!r}"
            return _error(404, text, "model", "model_not_found")
        prompts = await asyncio.to_thread(body.prompts, tokenizer)
        requests = body.requests(prompts, body.limit(engine.manifest.workload.output_tokens))
        answers = Answers(engine, requests, tokenizer, body.stops, metrics.finished)
        shape.prompt_tokens = sum(len(ids) for ids in prompts)
        if body.stream:
            return EventStream(shape, answers, body.include_usage)
        return await gather(shape, answers, http)

    _report_errors(app)
    return app


def _report_errors(app: FastAPI) -> None:
    """Every error has OpenAI's body."""

    @app.exception_handler(RequestValidationError)
    async def malformed(http: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this field is unknown, or not served with this value"
        return _error(400, f"{'.'.join(place)}: {message}" if place else message, *place[:1])

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> Response:
        return _error(error.status_code, f"{http.method} {http.url.path}: {error.detail}")

    @app.exception_handler(BadInput)
    async def bad_input(http: HttpRequest, error: BadInput) -> Response:
        return _error(400, str(error))

    @app.exception_handler(MnemocError)
    async def fault(http: HttpRequest, error: MnemocError) -> Response:
        return _error(503, str(error))

    @app.exception_handler(Exception)
    async def bug(http: HttpRequest, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return _error(500, "an error of the server's own")


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)
