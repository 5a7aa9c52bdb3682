"""How requests fare while somebody waits: what is predicted when they come, and progress in streams.

A stream whose prompt waits or prefills gets a comment (a line that begins with a colon, which clients of
server-sent events skip) when it begins and every `news_every_s` from then on; one that is silent for other
reasons gets one every SILENCE_S, for proxies that close what says nothing. One look at the engine serves all
streams.

    : prefill {"state": "prefill", "done": 4096, "total": 1000000, "percent": 0.4, "eta_s": 61.2}
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType

from ...errors import MnemocError, RuntimeFault
from ..engine import Engine
from ..request import Handle, Progress
from ..telemetry.snapshot import InFlight, Look, Snapshot
from .answers import Answers

SILENCE_S = 15.0
REMEMBERED = 256
"""Requests that are over and can still be asked for."""


def comment(progress: Progress) -> str:
    """As a comment among server-sent events."""
    body = {
        "state": progress.state,
        "done": progress.done,
        "total": progress.total,
        "percent": round(100 * progress.done / progress.total, 1),
        "eta_s": round(progress.eta_s, 3),
    }
    return f": prefill {json.dumps(body)}\n\n"


@dataclass(frozen=True)
class Over:
    """An answer that is over: what is left to say when its prompt is let go.

    state: "finished", "aborted" or "failed"
    """

    state: str
    prompt: int
    generated: int
    max_tokens: int
    predicted_ttft_s: float | None
    ttft_s: float | None
    finish: str | None

    @classmethod
    def of(cls, handle: Handle) -> Over:
        finish = handle.finish_reason
        state = (
            "failed" if handle.error else "aborted" if finish in (None, "cancelled") else "finished"
        )
        return cls(
            state,
            len(handle.request.prompt_ids),
            len(handle.tokens),
            handle.request.max_tokens,
            handle.predicted_ttft_s,
            handle.ttft_s,
            finish if state == "finished" else None,
        )


@dataclass(eq=False)
class Followed:
    """One HTTP request, from its admission on; as a context, until it is over.

    name: what it can be asked for by; created_s: Unix time; first: how its prompts stood when it came
    answers: None when it is over, so that its prompts are let go; over: what is left of them then
    """

    name: str
    stream: bool
    answers: Answers | None
    following: Following
    first: tuple[Progress, ...] = ()
    over: tuple[Over, ...] | None = None
    created_s: float = field(default_factory=time.time)
    _said_s: float = field(default_factory=time.monotonic)

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.following.forget(self)

    @property
    def handles(self) -> list[Handle]:
        return self.answers.handles if self.answers is not None else []

    @property
    def headers(self) -> dict[str, str]:
        """The longest TTFT of its answers, as predicted and, once they have all begun, as measured."""
        handles, found = self.handles, {}
        predicted_s = [h.predicted_ttft_s for h in handles if h.predicted_ttft_s is not None]
        measured_s = [h.ttft_s for h in handles if h.ttft_s is not None]
        if predicted_s:
            found["X-Predicted-TTFT-Seconds"] = f"{max(predicted_s):.4f}"
        if len(measured_s) == len(handles):
            found["X-Measured-TTFT-Seconds"] = f"{max(measured_s):.4f}"
        return found

    def said(self) -> None:
        """Something went to the client."""
        self._said_s = time.monotonic()

    def in_want(self) -> list[Handle]:
        """Answers of which the client should hear something: that have not begun, or, in silence, all.

        Who does not read what there is wants nothing more.
        """
        if not self.stream or self.answers is None or self.answers.behind:
            return []
        silent = time.monotonic() - self._said_s > SILENCE_S
        return [handle for handle in self.handles if silent or not handle.tokens]

    def news(self, stands: Collection[InFlight]) -> None:
        """Tell the client of the answer that takes longest."""
        if self.answers is not None and stands:
            self.answers.tell(progress_of(max(stands, key=lambda one: one.eta_s or 0.0)))


class Following:
    """All HTTP requests that are not over, and the last that are, by name."""

    def __init__(self, engine: Engine, news_every_s: float) -> None:
        self._engine = engine
        self._news_every_s = news_every_s
        self._now: dict[str, Followed] = {}
        self._past: deque[Followed] = deque(maxlen=REMEMBERED)
        self._telling: asyncio.Task[None] | None = None

    async def follow(self, name: str, answers: Answers, stream: bool) -> Followed:
        """Once the engine has taken the request on. Raises what it was refused with."""
        followed = Followed(name, stream, answers, self)
        self._now[name] = followed
        try:
            snapshot = await self.look(answers.handles if stream else ())
            for handle in answers.handles:
                if handle.error is not None:
                    raise handle.error
        except BaseException:
            answers.close()
            self.forget(followed)
            raise
        if stream:
            followed.first = tuple(progress_of(one) for one in snapshot.wanted.values())
            if self._telling is None:
                self._telling = asyncio.ensure_future(self._tell())
        return followed

    def forget(self, followed: Followed) -> None:
        """It is over: its prompt is let go."""
        followed.over = tuple(Over.of(handle) for handle in followed.handles)
        if self._now.get(followed.name) is followed:
            del self._now[followed.name]
        followed.answers = None
        self._past.append(followed)

    def find(self, name: str) -> Followed | None:
        """By its name, or by the id of its answer, which is its name after "cmpl-" or "chatcmpl-"."""
        names = name, name.partition("-")[2]
        found = (one for one in self.all() if one.name in names)
        return next(found, None)

    def all(self) -> Iterable[Followed]:
        """Those in flight, then those that are over; in each case the latest first."""
        yield from reversed(self._now.values())
        yield from reversed(self._past)

    async def look(self, handles: Collection[Handle]) -> Snapshot:
        """How these stand. What was submitted before has been taken on by then."""
        answer: Future[Snapshot] = Future()
        wanted = [handle.id for handle in handles]

        def put(snapshot: Snapshot) -> None:
            if answer.set_running_or_notify_cancel():  # whoever asked may be gone
                answer.set_result(snapshot)

        if not self._engine.look(Look(put, wanted=wanted)):
            raise RuntimeFault("the engine has ended")
        return await asyncio.wrap_future(answer)

    async def _tell(self) -> None:
        """While there are streams, one look for all of them that need one."""
        while any(one.stream for one in self._now.values()):
            await asyncio.sleep(self._news_every_s)
            wanting = [(one, handles) for one in self._now.values() if (handles := one.in_want())]
            if not wanting:
                continue
            try:
                found = (await self.look([h for _, handles in wanting for h in handles])).wanted
            except MnemocError:
                break
            for one, handles in wanting:
                one.news([found[handle.id] for handle in handles if handle.id in found])
        self._telling = None


def progress_of(stands: InFlight) -> Progress:
    eta_s = stands.eta_s if stands.eta_s is not None else 0.0
    return Progress(stands.prefilled, stands.prompt, eta_s, stands.state)
