"""Leaving in good order: who has come is served to the end, who comes now is sent elsewhere.

At the first SIGTERM or Ctrl-C `/health` turns to 503, new requests are refused with 503 and Retry-After, and
those that are there go on. When they are through, or time is up, the server ends; a second signal ends it at
once. Streams that are cut short end with an error event. Where the engine gives up, the server ends too, for
its supervisor to start it again.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import MnemocError
from ..engine import Engine

FLUSH_S = 3
"""Then clients may take so long to read what has been written for them."""
RETRY_S = 1
"""When to try again: by then a balancer has another address."""
TOLD = "the server was told to stop before this answer was complete"


class Doors:
    """The application behind doors that can be closed: then nothing new is accepted, and `/health` says so.

    inside: requests that are being answered, but for mere looks
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.closed = False
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] == "POST"
        if self.closed and (asks or scope.get("path") == "/health"):
            await _turn_away(send)
            return
        self.inside += asks
        try:
            await self._app(scope, receive, send)
        finally:
            self.inside -= asks


async def _turn_away(send: Send) -> None:
    error = {"message": "the server is shutting down", "type": "server_error"}
    body = json.dumps({"error": {**error, "param": None, "code": "shutting_down"}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % RETRY_S),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class DrainingServer(uvicorn.Server):
    """Uvicorn, that stops as this module's head says.

    drain_s: how long requests may still take; ready: called once signals and requests are heard
    fault: why the engine gave up, if that ended the server
    """

    def __init__(
        self,
        config: uvicorn.Config,
        doors: Doors,
        engine: Engine,
        drain_s: float,
        ready: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._doors = doors
        self._engine = engine
        self._drain_s = drain_s
        self._until_s = math.inf
        self.fault: MnemocError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not as uvicorn does it: that raises the signal once more in the end, and so hides the exit code."""
        again, self._doors.closed = self._doors.closed, True
        self._until_s = time.monotonic() + (0 if again else self._drain_s)

    async def on_tick(self, counter: int) -> bool:
        if self._doors.closed:
            if not self._doors.inside:
                return True
            if time.monotonic() >= self._until_s:
                await asyncio.to_thread(self._engine.close, TOLD)
                return True
        elif self._engine.failure is not None:
            self.fault, self._doors.closed = self._engine.failure, True
            return True
        return await super().on_tick(counter)
