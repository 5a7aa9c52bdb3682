"""The OpenAI-compatible HTTP application over an engine: one file of routes for each of its concerns.

Streams are server-sent events; while a prompt prefills, comments in them tell how far it is (clients
that do not know comments skip them). When a client goes away, its requests are cancelled at once.
"""

from __future__ import annotations

from fastapi import FastAPI

from ..engine import Engine
from ..tokenizer import Tokenizer
from . import about, completions, live, requests, tokens
from .access import Access
from .chronicle import Chronicle
from .conversation import Template
from .limits import Gate
from .openapi import Application
from .options import Options
from .problems import report_errors
from .service import Service


def create_app(
    engine: Engine,
    tokenizer: Tokenizer | None,
    options: Options | None = None,
    template: Template | None = None,
    chronicle: Chronicle | None = None,
) -> FastAPI:
    """The application, over a running engine. Without a tokenizer prompts are token ids.

    template: how the model reads a conversation; else it gets a plain form
    chronicle: is told of every request
    """
    service = Service.over(engine, tokenizer, options or Options(), template)
    app = Application(service)
    for concern in (about, completions, requests, tokens, live):
        app.include_router(concern.routes(service))
    app.add_middleware(Gate, service=service)
    report_errors(app)
    if chronicle is not None:
        app.add_middleware(Access, chronicle=chronicle)
        engine.watched_by(chronicle)
        service.metrics.count_drops(chronicle)
    return app
