"""What the server says of itself: `/health`, `/metrics`, `/v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from .service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    engine, metrics = service.engine, service.metrics

    @router.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.healthy else 503)

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {
            "id": service.model,
            "object": "model",
            "created": service.started_s,
            "owned_by": "mnemoc",
            "max_model_len": engine.manifest.workload.context,
        }
        return {"object": "list", "data": [entry]}

    return router
