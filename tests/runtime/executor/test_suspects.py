"""Whose fault it is that workers die."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from mnemoc.runtime.executor.suspects import DEATHS, Suspects

REACHED = 50


def deaths_until_found(poison: int, crowd: int, newcomers: int) -> int:
    """Workers die whenever the poison is before them, as whoever is not held back is; then more come."""
    suspects, going = Suspects(), list(range(crowd))
    for death in range(1, 30):
        while poison in suspects.held:  # those on trial come past where they stood
            for id in [id for id in going if id not in suspects.held]:
                suspects.computed(id, REACHED)
        found = suspects.died({id: (40, REACHED) for id in going if id not in suspects.held})
        if found is not None:
            assert found == poison
            assert suspects.deaths(poison) >= DEATHS
            return death
        going += range(len(going), len(going) + newcomers)
    raise AssertionError("the poison is never found")


@given(st.data(), st.integers(1, 200), st.integers(0, 5))
def test_each_death_halves_those_whose_fault_it_may_be(
    data: st.DataObject, crowd: int, newcomers: int
) -> None:
    poison = data.draw(st.integers(0, crowd - 1))
    assert deaths_until_found(poison, crowd, newcomers) <= DEATHS + (crowd - 1).bit_length()


def test_whoever_comes_past_where_it_stood_is_innocent() -> None:
    suspects = Suspects()
    for _ in range(10):
        assert suspects.died({1: (10, 20), 2: (29, 30)}) is None
        assert not suspects.computed(1, 19)
        assert not suspects.computed(1, 20)
        assert not suspects.computed(2, 31)
        assert not suspects
        assert not suspects.held


def test_nobody_waits_for_a_trial_that_is_over() -> None:
    suspects = Suspects()
    for _ in range(DEATHS - 1):
        suspects.died(dict.fromkeys(range(4), (8, 9)))
    assert suspects.held == {2, 3}
    assert not suspects.computed(0, 9)
    assert suspects.forget(1), "its client left"
    assert suspects.held == {3}
    assert suspects.computed(2, 9)
    assert suspects.held == frozenset()
    assert suspects.computed(3, 9)
    assert not suspects


def test_a_request_is_not_blamed_for_deaths_while_it_was_elsewhere() -> None:
    suspects = Suspects()
    for _ in range(10):  # its replay never comes as far as it once was
        assert suspects.died({1: (99, 100)}) is None
        assert suspects.died({1: (0, 48)}) is None
        assert not suspects.held


def test_chunks_may_be_cut_otherwise_each_time() -> None:
    suspects = Suspects()
    assert suspects.died({1: (64, 192)}) is None
    assert suspects.died({1: (0, 100)}) is None
    assert suspects.died({1: (96, 224)}) == 1
