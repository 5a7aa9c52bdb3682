"""Curves through points: the n-half model, its fit and what follows from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.planner.curves import constant, through

shares = st.floats(0.01, 1.0)


@given(full=shares, half=st.floats(0.1, 1e6), x=st.floats(1, 1e6), ratio=st.floats(1.5, 100))
def test_a_curve_goes_exactly_through_two_points_of_its_kind(
    full: float, half: float, x: float, ratio: float
) -> None:
    points = [(size, full * size / (size + half)) for size in (x, ratio * x)]
    curve = through(points, "rows", "test")
    assert curve.residual == pytest.approx(0, abs=1e-9)
    for size, share in points:
        assert curve.share(size) == pytest.approx(share)


@given(points=st.dictionaries(st.integers(1, 10**6), shares, min_size=1, max_size=8))
def test_a_fit_stays_physical_whatever_it_is_given(points: dict[int, float]) -> None:
    curve = through([(float(x), points[x]) for x in sorted(points)], "B", "test")
    assert 0 < curve.full <= 1
    assert curve.half >= 0
    worst = max(abs(e / curve.share(x) - 1) for x, e in points.items())
    assert curve.residual == pytest.approx(worst)


@given(points=st.dictionaries(st.integers(1, 10**4), shares, min_size=2, max_size=6))
def test_no_other_curve_misses_the_points_by_less(points: dict[int, float]) -> None:
    """Against a grid of curves around the one that was found."""
    listed = [(float(x), points[x]) for x in sorted(points)]
    curve = through(listed, "B", "test")

    def missed(full: float, half: float) -> float:
        return sum((e / (full * x / (x + half)) - 1) ** 2 for x, e in listed)

    least = missed(curve.full, curve.half)
    for full in (0.5, 0.9, 0.99, 1.01, 1.1, 2):
        for half in (-1.0, -1e-3, 0.0, 1e-3, 1.0, 100.0):
            other = curve.full * full, curve.half + half
            if other[0] <= 1 and other[1] >= 0:
                assert least <= missed(*other) + 1e-9


def test_one_point_or_one_figure_is_the_same_at_every_size() -> None:
    for curve in (through([(5.0, 0.4)], "B", "test"), constant(0.4, "B", "test")):
        assert curve.share(1) == curve.share(1e9) == pytest.approx(0.4)
