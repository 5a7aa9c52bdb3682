"""Who may ask, and how many at once: what every request passes before a route sees it.

Each request gets a name here, its own X-Request-Id or a new one, which goes back with the answer, errors too.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Awaitable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import MnemocError
from .again import Again
from .problems import REQUEST_ID, Problem
from .service import Service

OPEN_PATHS = frozenset({"/", "/health", "/ping"})
"""Probes of orchestrators come without a key, and so may the live page, which holds nothing."""

GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})
_ID = re.compile(r"[!-~]{1,128}")


class Keys:
    """API keys, kept and compared as digests: neither length nor content shows in the time that takes."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def admit(self, authorization: str | None) -> bool:
        """Whether a header "Bearer KEY" holds one of them; all are compared, whichever fits."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        found = False
        for own in self._digests:
            found |= hmac.compare_digest(own, digest)
        return (found and scheme.lower() == "bearer") or not self._digests


class Gate:
    """ASGI middleware: names requests, checks keys, bounds how many are at work."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._limits = service.options.limits
        self._keys = Keys(self._limits.api_keys)
        self._again = Again(service.engine, service.following)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state["named"] = _ID.fullmatch(given) is not None

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = state["request_id"]
            await send(message)

        path = scope["path"]
        if path not in OPEN_PATHS and not self._keys.admit(headers.get("authorization")):
            await _unauthorized().response(scope, receive, named)
        elif path not in GENERATING:
            await self._app(scope, receive, named)
        else:
            await self._generate(scope, receive, named)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits, load = self._limits, self._service.load
        if limits.concurrency is not None and load.in_flight >= limits.concurrency:
            text = f"{load.in_flight} requests are at work, as many as may be"
            busy = await _busy(text, self._again.when_one_ends())
            await busy.response(scope, receive, send)
            return
        waiting = self._service.engine.num_waiting
        if limits.queue is not None and waiting >= limits.queue:
            text = f"{waiting} answers wait for their turn, as many as may"
            busy = await _busy(text, self._again.when_one_starts())
            await busy.response(scope, receive, send)
            return
        load.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            load.in_flight -= 1


async def _busy(text: str, room: Awaitable[int]) -> Problem:
    """room: seconds until there is some"""
    try:
        wait_s = await room
    except MnemocError as error:
        return Problem(503, str(error))
    again = {"Retry-After": str(wait_s)}
    return Problem(429, f"{text}; try again in {wait_s} s", code="overloaded", headers=again)


def _unauthorized() -> Problem:
    return Problem(
        401,
        "no valid API key came with the request; send it as Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
