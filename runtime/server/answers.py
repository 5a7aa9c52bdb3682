"""From the engine's events to text for an HTTP client: detokenised, cut at stop strings, merged.

One HTTP request may ask for several answers (several prompts, n > 1). `Answers` makes one stream of
pieces of their events. What comes while nobody reads is put together: a slow client gets fewer and
longer pieces, and costs no more memory than its text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import Literal

from ...errors import MnemocError
from ..engine import Engine
from ..request import Ended, Event, FinishReason, Handle, Prepared, Progress, Token
from ..tokenizer import Detokenizer, Tokenizer
from .logprobs import Scored
from .mailbox import Mailbox

Finish = FinishReason | Literal["abort"]
MOST_SCORED = 256
"""Tokens with logprobs in one piece: all that a slow client has not read, made into JSON at once, would hold
everybody up."""


@dataclass(slots=True)
class Piece:
    """Some text of answer `index`, and its tokens with logprobs, where asked for.

    tokens: how many the answer has by now; finish: why it ends here, if it does
    """

    index: int
    tokens: int = 0
    finish: Finish | None = None
    scored: list[Scored] = field(default_factory=list)
    _text: StringIO = field(default_factory=StringIO)  # a str would be copied with each token

    @property
    def text(self) -> str:
        return self._text.getvalue()

    def write(self, text: str) -> None:
        """More of it."""
        self._text.write(text)


class StopStrings:
    """Finds the first stop string in growing text, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string follows it."""
        if not self._stops:
            return text, False
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
    """One answer as it grows, and the pieces of it that nobody has read."""

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
        self.unread: list[Piece] = []

    def take(self) -> list[Piece]:
        """What there is to read; from then on nothing."""
        unread, self.unread = self.unread, []
        return unread

    def push(self, token: Token) -> bool:
        """Take a token; whether there is something to read now, and was nothing before.

        A token that ends the answer by its id has no text.
        """
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
        return self._add(shown, token.index + 1, finish, scored)

    def abort(self, tokens: int) -> bool:
        """It ends here, after so many tokens, by somebody's wish; as `push`."""
        self.open = False
        return self._add(self.stops.rest(), tokens, "abort", None)

    def _add(self, text: str, tokens: int, finish: Finish | None, scored: Scored | None) -> bool:
        if not (text or finish or scored):
            return False
        fresh = not self.unread
        if fresh or len(self.unread[-1].scored) == MOST_SCORED:
            self.unread.append(Piece(self.index))
        piece = self.unread[-1]
        piece.write(text)
        piece.tokens = tokens
        piece.finish = finish
        if scored is not None:
            piece.scored.append(scored)
        return fresh


class Answers:
    """The answers to one HTTP request. Iterate `pieces()`; `close()` cancels what still runs.

    generated: tokens of all answers so far
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Prepared],
        tokenizer: Tokenizer | None,
        stops: Sequence[str],
        mailbox: Mailbox,
    ) -> None:
        """Submit the requests; raises BadInput if one can never be served (none is left behind)."""
        self.generated = 0
        self.handles: list[Handle] = []
        self._open = len(requests)
        self._news = asyncio.Event()
        self._unread: list[_Answer] = []
        self._progress: Progress | None = None
        self._error: Exception | None = None
        try:
            for index, prepared in enumerate(requests):
                answer = _Answer(index, tokenizer, stops, prepared.request.sampling.min_tokens)
                sink = mailbox.sink(partial(self._take, answer))
                self.handles.append(engine.submit(prepared, sink))
        except MnemocError:
            self.close()
            raise

    async def pieces(self) -> AsyncIterator[Piece | Progress]:
        """Text as it comes, and prefill progress; raises the error that ended an answer."""
        while self._open or self._unread:
            await self._news.wait()
            self._news.clear()
            if self._progress is not None:
                progress, self._progress = self._progress, None
                yield progress
            unread, self._unread = self._unread, []
            for answer in unread:
                for piece in answer.take():
                    yield piece
            if self._error is not None:
                raise self._error

    @property
    def behind(self) -> bool:
        """Whether whoever reads has yet to read what there is."""
        return bool(self._unread) or self._progress is not None

    def tell(self, progress: Progress) -> None:
        """How far a prompt is, for whoever reads. From the event loop."""
        self._progress = progress
        self._news.set()

    def close(self) -> None:
        """Free what the answers hold; harmless when they are done."""
        for handle in self.handles:
            if handle.finish_reason is None:
                handle.cancel()

    def _take(self, answer: _Answer, event: Event) -> None:
        """From the mailbox. Nothing is raised here, where other requests' events would suffer."""
        if not answer.open:
            return
        try:
            self._hear(answer, event)
        except Exception as error:
            self._error = error
        self._news.set()

    def _hear(self, answer: _Answer, event: Event) -> None:
        if isinstance(event, Token):
            self.generated += 1
            if answer.push(event):
                self._unread.append(answer)
            if not answer.open and not event.finish:
                self.handles[answer.index].stop()  # a stop string: the engine would go on
        elif isinstance(event, Ended):
            if event.error is not None:
                raise event.error
            if answer.abort(len(self.handles[answer.index].tokens)):
                self._unread.append(answer)
        self._open -= not answer.open
