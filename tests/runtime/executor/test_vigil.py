"""Which workers are silent, by a clock that is turned by hand."""

from __future__ import annotations

import pytest
from mnemoc.runtime.executor import vigil
from mnemoc.runtime.executor.vigil import LOADING_SILENCE_S, LOOK_S, SILENCE_S, Vigil


class Hand:
    """Turns the clock; the engine looks as often as it does, or is kept from it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def silent_after(self, watched: Vigil, ready: set[int], most_s: float) -> tuple[int, float]:
        """Who is found silent, and after how many seconds of looking."""
        began_s = self.now_s
        while self.now_s < began_s + most_s:
            self.now_s += LOOK_S
            if (found := watched.silent(ready)) is not None:
                return found[0], self.now_s - began_s
        return -1, most_s


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(vigil, "time", hand)
    return hand


@pytest.fixture
def watched(hand: Hand) -> Vigil:
    watched = Vigil(_looked_s=hand.now_s)
    watched.begin(range(2), join_s=20)
    return watched


def test_a_ready_worker_is_missed_sooner_than_one_that_loads(hand: Hand, watched: Vigil) -> None:
    watched.heard(0)
    watched.heard(1)
    assert hand.silent_after(watched, {1}, 60) == (1, SILENCE_S + LOOK_S)
    watched.heard(1)
    rank, after_s = hand.silent_after(watched, set(), 60)
    assert rank == 0
    assert after_s == LOADING_SILENCE_S - SILENCE_S


def test_a_worker_that_never_comes_is_missed_too(hand: Hand, watched: Vigil) -> None:
    watched.heard(1)
    rank, after_s = hand.silent_after(watched, set(), 60)
    assert (rank, after_s) == (0, 20 + LOOK_S)


def test_an_engine_that_was_stopped_itself_does_not_blame_its_workers(
    hand: Hand, watched: Vigil
) -> None:
    watched.heard(0)
    watched.heard(1)
    hand.now_s += 600
    assert watched.silent({0, 1}) is None


def test_workers_that_were_ended_are_not_missed(hand: Hand, watched: Vigil) -> None:
    watched.end()
    assert hand.silent_after(watched, {0, 1}, 100)[0] == -1
