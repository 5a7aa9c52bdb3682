"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from ..request import Prepared
from .answers import Answers
from .api import ChatBody, CompletionBody
from .bodies import parse, read
from .origins import named
from .replies import ChatShape, CompletionShape, EventStream, Shape, gather
from .service import Service

AnyBody = CompletionBody | ChatBody

LIGHT_BYTES = 4096
"""A body up to here is dealt with where it is: a thread would take longer."""


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    model = service.model

    @router.post("/v1/completions")
    async def completions(http: HttpRequest) -> Any:
        return await answer(CompletionBody, CompletionShape, http)

    @router.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Any:
        return await answer(ChatBody, ChatShape, http)

    async def answer(kind: type[AnyBody], shaped: type[Shape], http: HttpRequest) -> Any:
        raw = await read(http, service.most_body_bytes, service.options.limits.body_s)
        light = len(raw) <= LIGHT_BYTES and kind is CompletionBody  # templates may take their time
        understand = functools.partial(_understand, service, kind, raw)
        body, requests, prompt_tokens = (
            understand() if light else await asyncio.to_thread(understand)
        )
        if body.request_id is not None and not http.state.named:
            http.state.request_id = body.request_id
        shape = shaped(model, http.state.request_id)
        shape.prompt_tokens = prompt_tokens
        requests = named(http, requests, model)
        answers = Answers(service.engine, requests, service.tokenizer, body.stops, service.mailbox)
        followed = await service.following.follow(http.state.request_id, answers, body.stream)
        if body.stream:
            return EventStream(shape, answers, body.options, followed)
        with followed:
            response = await gather(shape, answers, http)
            response.headers.update(followed.headers)
            return response

    return router


def _understand(
    service: Service, kind: type[AnyBody], raw: bytes
) -> tuple[AnyBody, list[Prepared], int]:
    """What a body asks for, and the tokens of its prompts. Raises BadInput, ValidationError, Problem."""
    body = kind.model_validate(parse(raw))
    service.check_model(body.model)
    engine = service.engine
    prompts = body.prompts(service.tokenizer, service.template)
    default, strict = engine.manifest.workload.output_tokens, service.options.strict_slo
    requests = body.requests(prompts, body.limit(default), strict)
    return body, [engine.prepare(request) for request in requests], sum(map(len, prompts))
