"""Who asks: what an HTTP request says of itself, for logs and traces."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence

from starlette.requests import Request as HttpRequest

from ..request import Origin, Request

OPERATIONS = {"/v1/chat/completions": "chat"}
MOST_ID = 128


def named(http: HttpRequest, requests: Sequence[Request], model: str) -> list[Request]:
    """The requests, each with its origin: the client's X-Request-Id or one of ours, and its trace."""
    given = getattr(http.state, "request_id", None) or http.headers.get("x-request-id")
    id = (given or uuid.uuid4().hex)[:MOST_ID]
    origin = Origin(
        id,
        operation=OPERATIONS.get(http.url.path, "text_completion"),
        model=model,
        traceparent=http.headers.get("traceparent"),
        tracestate=http.headers.get("tracestate"),
    )
    return [
        dataclasses.replace(request, origin=dataclasses.replace(origin, index=index))
        for index, request in enumerate(requests)
    ]
