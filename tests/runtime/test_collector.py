"""The garbage collector, kept out of steps: seldom, but not never."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from mnemoc.runtime import collector


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """The generations that were collected, as they are."""
    found, before = list[int](), gc.get_threshold()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    collector.keep_out()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*before)
    gc.unfreeze()


def test_a_step_of_thousands_of_objects_is_not_collected(collected: list[int]) -> None:
    kept = [[number] for number in range(4000)]
    assert (len(kept), collected) == (4000, [])


def test_cycles_do_not_pile_up(collected: list[int]) -> None:
    for _ in range(2 * collector.YOUNG):
        cycle: list[object] = []
        cycle.append(cycle)
    assert collected, "the collector was woken"
    assert gc.get_count()[0] <= collector.YOUNG


def test_what_is_there_at_the_start_does_not_put_off_looking_at_all_that_came(
    collected: list[int],
) -> None:
    kept = [[number] for number in range(2 * collector.YOUNG * (collector.OLDER + 1) ** 2)]
    assert kept
    assert max(collected) == 2
