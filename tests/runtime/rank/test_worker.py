"""How a worker loads; in which order it prepares, launches and finishes what comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from mnemoc.errors import BadInput
from mnemoc.runtime.protocol.messages import Step
from mnemoc.runtime.rank.settings import Settings
from mnemoc.runtime.rank.stage import Stage
from mnemoc.runtime.rank.worker import load, serve


class Ended(Exception):
    """No step will come any more."""


class Recorder:
    """A stage that notes what it is told to do, as "p0" (prepare step 0), "l0", "f0".

    ahead: as of `Stage`; answers: whether it has anything to finish; others: steps that do not concern it
    """

    def __init__(self, ahead: int, answers: bool = True, others: Sequence[int] = ()) -> None:
        self.ahead, self.answers, self.others = ahead, answers, others
        self.done: list[str] = []

    def prepare(self, step: Step) -> int | None:
        self.done.append(f"p{step.number}")
        return None if step.number in self.others else step.number

    def launch(self, number: int) -> int | None:
        self.done.append(f"l{number}")
        return number if self.answers else None

    def finish(self, number: int) -> int:
        self.done.append(f"f{number}")
        return number


def run(stage: Recorder, bursts: Sequence[int]) -> tuple[str, list[Any]]:
    """Bursts of steps, each of which comes when all before it is done; what was done, and told."""
    come: list[Step] = []
    numbers, left, told = iter(range(100)), list(bursts), list[Any]()

    def receive() -> Step:
        if not come:
            if not left:
                raise Ended
            come.extend(Step(next(numbers)) for _ in range(left.pop(0)))
        return come.pop(0)

    with pytest.raises(Ended):
        serve(cast(Stage, stage), lambda: bool(come), receive, told.append)
    return " ".join(stage.done), told


def test_a_step_is_prepared_before_the_one_before_it_is_computed() -> None:
    assert run(Recorder(1), [3]) == ("p0 p1 l0 f0 p2 l1 f1 l2 f2", [0, 1, 2])


def test_a_gpu_has_the_next_step_before_the_last_one_is_finished() -> None:
    assert run(Recorder(2), [3]) == ("p0 p1 l0 p2 l1 f0 l2 f1 f2", [0, 1, 2])


def test_a_lone_step_is_finished_at_once() -> None:
    assert run(Recorder(2), [1, 1]) == ("p0 l0 f0 p1 l1 f1", [0, 1])


def test_ranks_that_do_not_answer_have_nothing_to_finish() -> None:
    assert run(Recorder(2, answers=False), [3]) == ("p0 p1 l0 p2 l1 l2", [])


def test_steps_of_other_groups_are_only_noted() -> None:
    assert run(Recorder(1, others=[0, 2]), [4]) == ("p0 p1 p2 p3 l1 f1 l3 f3", [1, 3])


@pytest.mark.parametrize(
    "error", [MemoryError("no more"), torch.OutOfMemoryError("no more\nof it")]
)
def test_a_stage_without_room_is_its_users_business(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(settings: Settings) -> Stage:
        raise error

    monkeypatch.setattr("mnemoc.runtime.rank.worker.Stage", refuse)
    with pytest.raises(BadInput, match=r"worker 3: no room for .* \(got 'no more'\)"):
        load(Settings(3, 0, 4, "", None, Path(), Path(), 1))
