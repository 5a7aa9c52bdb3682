"""Who asks: what an HTTP request says of itself, for logs and traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from starlette.requests import Request as HttpRequest

from ..request import Origin, Prepared

OPERATIONS = {"/v1/chat/completions": "chat"}


def named(http: HttpRequest, requests: Sequence[Prepared], model: str) -> list[Prepared]:
    """The requests, each with its origin: the id that the client gave or got, and its trace."""
    origin = Origin(
        http.state.request_id,
        operation=OPERATIONS.get(http.url.path, "text_completion"),
        model=model,
        traceparent=http.headers.get("traceparent"),
        tracestate=http.headers.get("tracestate"),
    )
    return [
        Prepared(
            dataclasses.replace(one.request, origin=dataclasses.replace(origin, index=index)),
            one.hashes,
        )
        for index, one in enumerate(requests)
    ]
