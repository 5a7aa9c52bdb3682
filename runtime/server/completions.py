"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from ..request import Request
from .answers import Answers
from .api import ChatBody, CompletionBody
from .bodies import parse, read
from .replies import ChatShape, CompletionShape, EventStream, Shape, gather
from .service import Service

AnyBody = CompletionBody | ChatBody
T = TypeVar("T")

LIGHT_BYTES = 4096
"""A body up to here, and as many token ids, are dealt with where they are: a thread would take longer."""


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
        body, requests, prompt_tokens = await _done(light, lambda: _understand(service, kind, raw))
        if body.request_id is not None and not http.state.named:
            http.state.request_id = body.request_id
        shape = shaped(model, http.state.request_id)
        shape.prompt_tokens = prompt_tokens
        answers = await _begin(service, body, requests, prompt_tokens)
        if body.stream:
            return EventStream(shape, answers, body.options)
        return await gather(shape, answers, http)

    return router


def _understand(
    service: Service, kind: type[AnyBody], raw: bytes
) -> tuple[AnyBody, list[Request], int]:
    """What a body asks for, and the tokens of its prompts. Raises BadInput, ValidationError, Problem."""
    body = kind.model_validate(parse(raw))
    service.check_model(body.model)
    prompts = body.prompts(service.tokenizer, service.template)
    default = service.engine.manifest.workload.output_tokens
    return body, body.requests(prompts, body.limit(default)), sum(map(len, prompts))


async def _begin(
    service: Service, body: AnyBody, requests: Sequence[Request], prompt_tokens: int
) -> Answers:
    """Hand the requests to the engine. It looks at every token of a prompt before it queues it."""
    submit = functools.partial(
        Answers,
        service.engine,
        requests,
        service.tokenizer,
        body.stops,
        service.metrics.finished,
        asyncio.get_running_loop(),
    )
    light = prompt_tokens * body.n <= LIGHT_BYTES
    return await _done(light, submit)


async def _done(here: bool, work: Callable[[], T]) -> T:
    """The result of some work, here or in a thread."""
    return work() if here else await asyncio.to_thread(work)
