"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from .answers import Answers
from .api import ChatBody, CompletionBody
from .problems import problem
from .replies import ChatShape, CompletionShape, EventStream, Shape, gather
from .service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    engine, tokenizer, model = service.engine, service.tokenizer, service.model

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Any:
        return await answer(body, CompletionShape(model), http)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Any:
        return await answer(body, ChatShape(model), http)

    async def answer(body: CompletionBody | ChatBody, shape: Shape, http: HttpRequest) -> Any:
        if body.model not in (None, model):
            text = f"the model {body.model!r} is not served here; it is {model!r}"
            return problem(404, text, "model", "model_not_found")
        prompts = await asyncio.to_thread(body.prompts, tokenizer)
        default, strict = engine.manifest.workload.output_tokens, service.options.strict_slo
        requests = body.requests(prompts, body.limit(default), strict)
        finished, mailbox = service.metrics.finished, service.mailbox
        answers = Answers(engine, requests, tokenizer, body.stops, finished, mailbox)
        shape.prompt_tokens = sum(len(ids) for ids in prompts)
        name = getattr(http.state, "request_id", shape.id)
        followed = await service.following.follow(name, answers, body.stream)
        if body.stream:
            return EventStream(shape, answers, body.include_usage, followed)
        with followed:
            response = await gather(shape, answers, http)
            response.headers.update(followed.headers)
            return response

    return router
