"""When those who are sent away are told to come again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from mnemoc.runtime.server.again import Again
from mnemoc.runtime.telemetry.stats import Stats

TOKEN_S = 0.1


def decodes(left_s: float, generated: int = 20) -> Any:
    return SimpleNamespace(left_s=left_s, eta_s=None, home=0, generated=generated, max_tokens=100)


def waits(eta_s: float, work_s: float) -> Any:
    """Seven seconds after it came; 40 s are promised."""
    slack_s = 40 - 7 - work_s
    times = {"eta_s": eta_s, "age_s": 7.0, "deadline_s": 40.0, "slack_s": slack_s}
    return SimpleNamespace(
        left_s=eta_s + 100 * TOKEN_S, home=None, generated=0, max_tokens=100, **times
    )


class Here:
    """Requests, each with its answers; None: one that is complete, and not read."""

    def __init__(self, *requests: Sequence[Any]) -> None:
        self.looks = 0
        self.stats = Stats()
        self._answers = dict(enumerate(answer for request in requests for answer in request))
        ids = iter(self._answers)
        self._requests = [
            SimpleNamespace(handles=[SimpleNamespace(id=next(ids)) for _ in request])
            for request in requests
        ]

    def all(self) -> list[Any]:
        return self._requests

    async def look(self, handles: Sequence[Any]) -> Any:
        self.looks += 1
        wanted = {one.id: self._answers[one.id] for one in handles if self._answers[one.id]}
        return SimpleNamespace(wanted=wanted, token_s=TOKEN_S)

    def told(self, what: str, times: int) -> list[int]:
        again: Any = Again(self, self)  # type: ignore[arg-type]

        async def ask() -> list[int]:
            return [await getattr(again, what)() for _ in range(times)]

        return asyncio.run(ask())


def test_each_is_told_of_another_end_and_a_request_ends_with_its_last_answer() -> None:
    here = Here([decodes(10.2), decodes(30)], [decodes(20)], [None, decodes(25)], [None])
    assert here.told("when_one_ends", 5) == [20, 25, 30, 30, 30]
    assert here.looks == 1


def test_answers_are_taken_to_have_as_many_tokens_as_others_had() -> None:
    here = Here([decodes(20)], [decodes(20, generated=70)])
    here.stats.tallies.request_params_max_tokens.add(400)
    here.stats.tallies.request_generation_tokens.add(200)
    assert here.told("when_one_ends", 2) == [15, 17]  # 50 tokens fewer, and 30


def test_a_place_in_the_queue_is_free_when_the_first_of_it_begins() -> None:
    here = Here([decodes(5)], [waits(50, work_s=20), waits(90, work_s=1)], [waits(31, work_s=30)])
    assert here.told("when_one_starts", 4) == [1, 30, 89, 89]


def test_of_bodies_that_are_being_read_nothing_is_known() -> None:
    assert Here().told("when_one_ends", 1) == [1]
    assert Here([None]).told("when_one_starts", 1) == [1]
