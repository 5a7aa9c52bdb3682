"""What goes back over HTTP: OpenAI's objects, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ...errors import MnemocError
from ..request import Progress
from .answers import Answers, Piece
from .api import StreamOptions
from .following import Followed, comment
from .logprobs import Scored, chat_logprobs, completion_logprobs

_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass
class Whole:
    """An answer, its pieces put together."""

    text: StringIO = field(default_factory=StringIO)
    finish: str | None = None
    scored: list[Scored] = field(default_factory=list)


class Shape:
    """The JSON of one HTTP request's answers. Subclasses say how a choice looks.

    Events are put together as text: but for what the model said, they are all the same.
    """

    prefix = ""
    whole = ""
    chunk = ""

    def __init__(self, model: str, request_id: str) -> None:
        self.prompt_tokens = 0
        self._head = {
            "id": f"{self.prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        head = _as_json({**self._head, "object": self.chunk})
        self._event_head = f'data: {head[:-1]},"choices":'

    def whole_choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def chunk_choice(self, text: str, first: bool) -> str:
        """Fields of an event's choice that hold the text, as JSON without its braces."""
        raise NotImplementedError

    def logprobs(self, scored: list[Scored]) -> Any:
        raise NotImplementedError

    def response(self, wholes: list[Whole], generated: int) -> Any:
        choices = [
            {
                "index": i,
                "logprobs": self.logprobs(whole.scored) if whole.scored else None,
                "finish_reason": whole.finish,
                **self.whole_choice(whole.text.getvalue()),
            }
            for i, whole in enumerate(wholes)
        ]
        usage = self.usage(generated)
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage}

    def event(self, piece: Piece, first: bool, *, usage: bool = False) -> str:
        """first: whether it is the first of its answer; usage: say how many tokens that has by now"""
        logprobs = _as_json(self.logprobs(piece.scored)) if piece.scored else "null"
        finish = f'"{piece.finish}"' if piece.finish else "null"
        counted = f',"usage":{_as_json(self.usage(piece.tokens))}' if usage else ""
        return (
            f'{self._event_head}[{{"index":{piece.index},{self.chunk_choice(piece.text, first)},'
            f'"logprobs":{logprobs},"finish_reason":{finish}}}]{counted}}}\n\n'
        )

    def usage_event(self, generated: int) -> str:
        return f'{self._event_head}[],"usage":{_as_json(self.usage(generated))}}}\n\n'

    def usage(self, generated: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }


class CompletionShape(Shape):
    """text_completion objects."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def chunk_choice(self, text: str, first: bool) -> str:
        return f'"text":{_as_json(text)}'

    def logprobs(self, scored: list[Scored]) -> Any:
        return completion_logprobs(scored)


class ChatShape(Shape):
    """chat.completion objects."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def chunk_choice(self, text: str, first: bool) -> str:
        role = '"role":"assistant",' if first else ""
        return f'"delta":{{{role}"content":{_as_json(text)}}}'

    def logprobs(self, scored: list[Scored]) -> Any:
        return chat_logprobs(scored)


async def gather(shape: Shape, answers: Answers, http: HttpRequest) -> Response:
    """The whole response; if the client goes away first, its requests are cancelled."""
    collecting = asyncio.ensure_future(_collect(answers))
    leaving = asyncio.ensure_future(_left(http.receive))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody is there to read it
        return JSONResponse(shape.response(collecting.result(), answers.generated))
    finally:
        collecting.cancel()
        leaving.cancel()
        answers.close()


async def _collect(answers: Answers) -> list[Whole]:
    wholes = [Whole() for _ in answers.handles]
    async for piece in answers.pieces():
        if isinstance(piece, Piece):
            whole = wholes[piece.index]
            whole.text.write(piece.text)
            whole.finish = piece.finish
            whole.scored += piece.scored
    return wholes


async def _left(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: pieces of the answers as they come, then usage if wanted, then [DONE]."""

    media_type = "text/event-stream"

    def __init__(
        self, shape: Shape, answers: Answers, options: StreamOptions, followed: Followed
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **followed.headers})
        del self.headers["content-length"]
        self.shape = shape
        self.answers = answers
        self.options = options
        self.followed = followed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.followed:
            await self._stream(receive, send)

    async def _stream(self, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            self.answers.close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for text in self._events():
            data = {"type": "http.response.body", "body": text.encode(), "more_body": True}
            await send(data)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[str]:
        begun: set[int] = set()
        for progress in self.followed.first:
            yield comment(progress)
        try:
            async for piece in self.answers.pieces():
                self.followed.said()
                if isinstance(piece, Progress):
                    yield comment(piece)
                else:
                    usage = self.options.continuous_usage_stats
                    yield self.shape.event(piece, piece.index not in begun, usage=usage)
                    begun.add(piece.index)
        except MnemocError as error:
            body = {"message": str(error), "type": "server_error", "param": None, "code": None}
            yield f"data: {_as_json({'error': body})}\n\n"
            return
        if self.options.include_usage:
            yield self.shape.usage_event(self.answers.generated)
        yield "data: [DONE]\n\n"
