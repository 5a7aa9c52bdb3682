"""The OpenAI-compatible HTTP application over an engine: one file of routes for each of its concerns.

Streams are server-sent events; while a prompt prefills, comments in them tell how far it is (clients
that do not know comments skip them). When a client goes away, its requests are cancelled at once.
Conversations are turned into text in a plain form (`api.chat_text`), not by the model's template.
"""

from __future__ import annotations

from fastapi import FastAPI

from ..engine import Engine
from ..tokenizer import Tokenizer
from . import about, completions, requests
from .options import Options
from .problems import report_errors
from .service import Service


def create_app(
    engine: Engine, tokenizer: Tokenizer | None, options: Options | None = None
) -> FastAPI:
    """The application, over a running engine. Without a tokenizer prompts are token ids."""
    app = FastAPI(title="mnemoc", docs_url=None, redoc_url=None)
    service = Service.over(engine, tokenizer, options or Options())
    for concern in (about, completions, requests):
        app.include_router(concern.routes(service))
    report_errors(app)
    return app
