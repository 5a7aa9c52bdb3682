"""From the engine's events to text for an HTTP client: detokenised, cut at stop strings, merged.

One HTTP request may ask for several answers (several prompts, n > 1). Their events come from the
engine's thread; `Answers` brings them into the event loop as one stream of pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import MnemocError
from ..engine import Engine
from ..request import Event, FinishReason, Handle, Progress, Request, Token
from ..tokenizer import Detokenizer, Tokenizer
from .logprobs import Scored


@dataclass(frozen=True)
class Piece:
    """Some text of answer `index`, and its token with logprobs, where asked for.

    finish: why it ends here, if it does
    """

    index: int
    text: str
    finish: FinishReason | Literal["abort"] | None = None
    scored: Scored | None = None


class StopStrings:
    """Finds the first stop string in growing text, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string follows it."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown, False

    def rest(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the text begin the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class _Answer:
    """One answer as it grows."""

    def __init__(
        self, index: int, tokenizer: Tokenizer | None, stops: Sequence[str], min_tokens: int
    ) -> None:
        self.index = index
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self.stops = StopStrings(stops)
        self.min_tokens = min_tokens
        self.characters = 0
        self.open = True

    def push(self, token: Token) -> Piece:
        """The piece that a token makes. A token that ends the answer by its id has no text."""
        text = ""
        if self.detokenizer is not None:
            text = "" if token.finish == "stop" else self.detokenizer.push(token.id)
            text += self.detokenizer.rest() if token.finish else ""
        scored = Scored.of(token, self.characters, self.tokenizer)
        self.characters += len(text)
        early = token.index < self.min_tokens
        shown, stopped = (text, False) if early else self.stops.push(text)
        finish: FinishReason | None = "stop" if stopped else token.finish
        if finish and not stopped:
            shown += self.stops.rest()
        self.open = finish is None
        return Piece(self.index, shown, finish, scored)


class Answers:
    """The answers to one HTTP request. Iterate `pieces()`; `close()` cancels what still runs."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        tokenizer: Tokenizer | None,
        stops: Sequence[str],
        on_finish: Callable[[Handle], None],
    ) -> None:
        """Submit the requests; raises BadInput if one can never be served (none is left behind).

        on_finish: called for each answer that got all its tokens.
        """
        self._on_finish = on_finish
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._answers = [
            _Answer(i, tokenizer, stops, request.sampling.min_tokens)
            for i, request in enumerate(requests)
        ]
        self.handles: list[Handle] = []
        try:
            for index, request in enumerate(requests):
                self.handles.append(engine.submit(request, _Sink(self, index)))
        except MnemocError:
            self.close()
            raise

    async def pieces(self) -> AsyncIterator[Piece | Progress]:
        """Text as it comes, and prefill progress; raises the error that ended an answer."""
        while any(answer.open for answer in self._answers):
            index, event = await self._events.get()
            answer = self._answers[index]
            if not answer.open:
                continue
            if isinstance(event, Token):
                piece = answer.push(event)
                if piece.finish and not event.finish:
                    self.handles[index].stop()  # a stop string: the engine would go on
                if piece.finish:
                    self._on_finish(self.handles[index])
                yield piece
            elif isinstance(event, Progress):
                yield event
            elif event.error is not None:
                raise event.error
            else:
                answer.open = False
                yield Piece(index, answer.stops.rest(), "abort")

    @property
    def generated(self) -> int:
        return sum(len(handle.tokens) for handle in self.handles)

    def tell(self, index: int, progress: Progress) -> None:
        """Pass on how far an answer's prompt is. From the event loop."""
        self._events.put_nowait((index, progress))

    def close(self) -> None:
        """Free what the answers hold; harmless when they are done."""
        for handle in self.handles:
            if handle.finish_reason is None:
                handle.cancel()

    def put(self, index: int, event: Event) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the server is gone: nobody reads it any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


@dataclass(frozen=True)
class _Sink:
    answers: Answers
    index: int

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Progress):  # the server asks for progress when it is time to tell
            self.answers.put(self.index, event)
