"""A line in the log for each HTTP request that asked for something, or was refused."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .chronicle import Chronicle

SILENT = frozenset({"/health", "/ping", "/metrics", "/load", "/live"})
"""Asked for again and again by machines: told only when refused."""


class Access:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, chronicle: Chronicle) -> None:
        self._app = app
        self._chronicle = chronicle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status, id = time.monotonic(), 0, ""

        async def seen(message: Message) -> None:
            nonlocal status, id
            if message["type"] == "http.response.start":
                status = message["status"]
                id = Headers(raw=message["headers"]).get("x-request-id", "")
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            if status >= 400 or scope["path"] not in SILENT:
                client = scope.get("client")
                self._chronicle.note(
                    "info" if 0 < status < 400 else "error" if status >= 500 else "warning",
                    "http",
                    request_id=id or None,
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    client=client[0] if client else None,
                    seconds=time.monotonic() - began_s,
                )
