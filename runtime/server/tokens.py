"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from ...errors import BadInput
from ..request import check_ids
from .api import DetokenizeBody, TokenizeText, encode, read_tokenize
from .bodies import parse, read
from .service import Service

SLICE = 4096
"""So many tokens become JSON in one call: a call for a million would keep everybody waiting."""


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        return await answer(http, _tokenize)

    @router.post("/detokenize")
    async def detokenize(http: HttpRequest) -> Response:
        return await answer(http, _detokenize)

    async def answer(http: HttpRequest, work: Callable[[Service, bytes], str]) -> Response:
        raw = await read(http, service.most_body_bytes, service.options.limits.body_s)
        text = await asyncio.to_thread(work, service, raw)
        return Response(text, media_type="application/json")

    return router


def _tokenize(service: Service, raw: bytes) -> str:
    body = read_tokenize(parse(raw))
    service.check_model(body.model)
    text = body.prompt if isinstance(body, TokenizeText) else body.text(service.template)
    ids = encode(text, service.tokenizer, special=body.add_special_tokens)
    names = "null"
    if body.return_token_strs and service.tokenizer is not None:
        names = _listed([service.tokenizer.name(id) for id in ids])
    return (
        f'{{"count": {len(ids)}, "max_model_len": {service.context}, '
        f'"tokens": {_listed(ids)}, "token_strs": {names}}}'
    )


def _detokenize(service: Service, raw: bytes) -> str:
    body = DetokenizeBody.model_validate(parse(raw))
    service.check_model(body.model)
    if service.tokenizer is None:
        raise BadInput("the model has no tokenizer.json", where="tokens")
    check_ids(body.tokens, service.engine.vocab, "tokens")
    return json.dumps({"prompt": service.tokenizer.decode(body.tokens, special=True)})


def _listed(values: Sequence[int | str]) -> str:
    """A JSON list, slice by slice."""
    slices = (values[at : at + SLICE] for at in range(0, len(values), SLICE))
    return "[" + ", ".join(json.dumps(list(part))[1:-1] for part in slices) + "]"
