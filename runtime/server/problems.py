"""Errors over HTTP, in OpenAI's words: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ...errors import BadInput, MnemocError
from ..request import TooLate

log = logging.getLogger("mnemoc.server")

KINDS = {429: "rate_limit_error"}


def report_errors(app: FastAPI) -> None:
    """Every error has OpenAI's body."""

    @app.exception_handler(RequestValidationError)
    async def malformed(http: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this field is unknown, or not served with this value"
        param = place[0] if place else None
        return problem(400, f"{'.'.join(place)}: {message}" if place else message, param)

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> Response:
        return problem(error.status_code, f"{http.method} {http.url.path}: {error.detail}")

    @app.exception_handler(BadInput)
    async def bad_input(http: HttpRequest, error: BadInput) -> Response:
        return problem(400, str(error))

    @app.exception_handler(TooLate)
    async def too_late(http: HttpRequest, error: TooLate) -> Response:
        """429, as a limit of rate is: clients know to wait. 503 would have balancers take the server away."""
        response = problem(429, str(error), "ttft_slo_s", "promise_cannot_be_kept", error.figures)
        response.headers["Retry-After"] = str(math.ceil(error.retry_s))
        return response

    @app.exception_handler(MnemocError)
    async def fault(http: HttpRequest, error: MnemocError) -> Response:
        return problem(503, str(error))

    @app.exception_handler(Exception)
    async def bug(http: HttpRequest, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return problem(500, "an error of the server's own")


def problem(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    figures: Mapping[str, float] | None = None,
) -> Response:
    """figures: what else the error says"""
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code, **(figures or {})}
    return JSONResponse({"error": error}, status_code=status)
