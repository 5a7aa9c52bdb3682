"""What the server says of itself: health, metrics, its model, its version, how much is at work."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from .service import Service

DOWN: dict[int | str, dict[str, Any]] = {503: {"description": "The workers are down"}}


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    engine, metrics = service.engine, service.metrics
    ours = version("mnemoc")  # found in a file: no request is to open one

    @router.get("/health", response_class=Response, responses=DOWN)
    @router.get("/ping", response_class=Response, responses=DOWN)
    async def health() -> Response:
        return Response(status_code=200 if engine.healthy else 503)

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    @router.get("/version")
    async def own_version() -> dict[str, str]:
        return {"version": ours}

    @router.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": service.load.in_flight}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return entry()

    def entry() -> dict[str, Any]:
        return {
            "id": service.model,
            "object": "model",
            "created": service.started_s,
            "owned_by": "mnemoc",
            "max_model_len": service.context,
        }

    return router
