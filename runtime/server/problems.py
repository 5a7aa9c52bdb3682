"""Errors over HTTP, in OpenAI's words: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ...errors import BadInput, MnemocError
from ..executor.suspects import Deadly
from ..request import TooLate
from .fields import NOT_SERVED

log = logging.getLogger("mnemoc.server")

KINDS = {401: "authentication_error", 429: "rate_limit_error"}
REQUEST_ID = "X-Request-Id"
BODY = "body"
"""Where something is wrong that is not in one of its fields."""
FORMS = frozenset({"str"})
"""Like `list[...]` and `[key]`, pydantic's words in a field's place for what it was taken for."""


class Problem(Exception):
    """An answer that says no: its status, a sentence, and what else goes with it.

    param: the field it is about; code: OpenAI's short name, where there is one; figures: in the body too
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": code, **(figures or {})}
        self.response = JSONResponse({"error": error}, status_code=status, headers=headers)


def report_errors(app: FastAPI) -> None:
    """Every error has OpenAI's body."""

    @app.exception_handler(Problem)
    async def said(http: HttpRequest, error: Problem) -> Response:
        return error.response

    @app.exception_handler(ValidationError)
    async def malformed(http: HttpRequest, error: ValidationError) -> Response:
        return _malformed(error).response

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> Response:
        sentence = f"{http.method} {http.url.path}: {error.detail}"
        return Problem(error.status_code, sentence, headers=error.headers).response

    @app.exception_handler(BadInput)
    async def bad_input(http: HttpRequest, error: BadInput) -> Response:
        field = error.where if isinstance(error.where, str) and error.where != BODY else None
        return problem(400, str(error), field)

    @app.exception_handler(TooLate)
    async def too_late(http: HttpRequest, error: TooLate) -> Response:
        """429, as a limit of rate is: clients know to wait. 503 would have balancers take the server away."""
        again = {"Retry-After": str(math.ceil(error.retry_s))}
        code = "promise_cannot_be_kept"
        return Problem(429, str(error), "ttft_slo_s", code, again, error.figures).response

    @app.exception_handler(Deadly)
    async def deadly(http: HttpRequest, error: Deadly) -> Response:
        """500, and a word that OpenAI's clients know: sent again, it would end the workers again."""
        return Problem(500, str(error), headers={"x-should-retry": "false"}).response

    @app.exception_handler(MnemocError)
    async def fault(http: HttpRequest, error: MnemocError) -> Response:
        return problem(503, str(error))

    @app.exception_handler(Exception)
    async def bug(http: HttpRequest, error: Exception) -> Response:
        # sent from outside the middleware, which names requests otherwise
        named = {REQUEST_ID: getattr(http.state, "request_id", "")}
        return Problem(500, "an error of the server's own", headers=named).response


def _malformed(error: ValidationError) -> Problem:
    """Of a field that takes several forms, the error of the form that came furthest."""
    found = error.errors(include_url=False, include_input=False)
    worst = max(found, key=lambda one: len(one["loc"]))
    place = [str(part) for part in worst["loc"] if part not in FORMS and "[" not in str(part)]
    message = worst["msg"].removeprefix("Value error, ")
    if worst["type"] == NOT_SERVED:
        place.append(worst["ctx"]["field"])
    elif worst["type"] == "extra_forbidden":
        message = "this field is unknown"
    elif worst["type"] == "model_type":
        place, message = place or [BODY], "Input should be an object"
    param = place[0] if place and place[0] != BODY else None
    return Problem(400, f"{'.'.join(place)}: {message}" if place else message, param)


def problem(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Response:
    return Problem(status, message, param, code).response
