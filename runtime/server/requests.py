"""`/requests`: what is in flight, how far it is, when it will be through; `DELETE` cancels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from ..telemetry.snapshot import InFlight
from .following import Followed, Over
from .problems import problem
from .service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    following = service.following

    async def told(some: Iterable[Followed]) -> list[dict[str, Any]]:
        some = list(some)
        handles = [handle for one in some for handle in one.handles]
        stands = (await following.look(handles)).wanted if handles else {}
        return [tell(one, stands) for one in some]

    @router.get("/requests")
    async def every() -> dict[str, Any]:
        return {"object": "list", "data": await told(following.all())}

    @router.get("/requests/{name}")
    async def one(name: str) -> Any:
        found = following.find(name)
        return unknown(name) if found is None else (await told([found]))[0]

    @router.delete("/requests/{name}")
    async def cancel(name: str) -> Any:
        found = following.find(name)
        if found is None:
            return unknown(name)
        if found.answers is None:
            return problem(409, f"the request {name!r} is over", "name", "request_is_over")
        found.answers.close()
        return (await told([found]))[0]

    return router


def unknown(name: str) -> Response:
    return problem(404, f"no request {name!r} is in flight or was of late", "name", "not_found")


def tell(one: Followed, stands: Mapping[int, InFlight]) -> dict[str, Any]:
    """A request as JSON: its answers in order, each in flight or over."""
    over = one.over or ()
    answers = [dataclasses.asdict(answer) for answer in over]
    for handle in one.handles:
        now = stands.get(handle.id)
        answers.append(dataclasses.asdict(Over.of(handle)) if now is None else in_flight(now))
    return {
        "id": one.name,
        "object": "request",
        "created": int(one.created_s),
        "stream": one.stream,
        "answers": answers,
    }


def in_flight(now: InFlight) -> dict[str, Any]:
    fields = dataclasses.asdict(now)
    for ours in ("id", "name", "home"):
        del fields[ours]
    return fields
