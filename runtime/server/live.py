"""The live page at `/`, and what it shows at `/live`.

The page holds no figure and is open to all; its data needs the server's key, where there is one. However many
people watch, the engine is looked at twice a second at most, and shows at most so many requests.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import re
import time
from importlib import resources
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from ..telemetry.snapshot import STATES, Look, Snapshot
from .service import Service

SHOWN = 40
FRESH_S = 0.5
"""How old an answer may be, so that many watchers cost as much as one."""
PATIENCE_S = 2.0
"""How long the engine may take between two steps; then the page gets what there was."""


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    page, headers = load_page()
    window = Window(service)

    @router.get("/", include_in_schema=False)
    async def live_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @router.get("/live", include_in_schema=False)
    async def live() -> Response:
        headers = {"cache-control": "no-store"}
        return Response(await window.look(), media_type="application/json", headers=headers)

    return router


def load_page() -> tuple[str, dict[str, str]]:
    """The page, and headers by which a browser runs nothing but what is in it."""
    page = resources.files(__package__).joinpath("live.html").read_text("utf-8")
    allowed = {
        kind: _digest(found[1])
        for kind in ("script", "style")
        if (found := re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL))
    }
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Window:
    """Looks at the engine for all who watch. Only in the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._seen = b""
        self._until_s = 0.0
        self._looking = asyncio.Lock()
        self._last: Snapshot | None = None

    async def look(self) -> bytes:
        """The engine's state as JSON, half a second old at most."""
        async with self._looking:
            now_s = time.monotonic()
            if now_s >= self._until_s:
                self._last = await self._ask()
                self._seen = json.dumps(self._told(self._last)).encode()
                self._until_s = time.monotonic() + FRESH_S
            return self._seen

    async def _ask(self) -> Snapshot | None:
        """A snapshot; the last one if the engine is busy, and none if it has ended."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Snapshot] = loop.create_future()

        def give(snapshot: Snapshot) -> None:
            if not answer.done():
                answer.set_result(snapshot)

        def hand_over(snapshot: Snapshot) -> None:
            loop.call_soon_threadsafe(give, snapshot)

        if not self._service.engine.look(Look(hand_over, SHOWN)):
            return None
        try:
            return await asyncio.wait_for(answer, PATIENCE_S)
        except TimeoutError:
            return self._last

    def _told(self, snapshot: Snapshot | None) -> dict[str, Any]:
        service, stats = self._service, self._service.engine.stats
        seen: dict[str, Any] = {
            "counts": dict.fromkeys(STATES, 0),
            "requests": [],
            "groups": [],
            "batches": [],
        }
        if snapshot is not None:
            seen = {
                "counts": dict(snapshot.counts),
                "requests": [dataclasses.asdict(one) for one in snapshot.requests],
                "groups": [dataclasses.asdict(group) for group in snapshot.groups],
                "batches": [batch._asdict() for batch in snapshot.batches],
            }
        return {
            "model": service.model,
            "uptime_s": time.time() - service.started_s,
            "healthy": service.engine.healthy,
            "restarts": stats.restarts,
            "promises": dataclasses.asdict(stats.promises),
            "lately": dataclasses.asdict(service.recent.lately()),
            **seen,
        }
