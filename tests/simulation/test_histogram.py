"""Percentiles in bounded memory against numpy's, which keeps everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.runtime.simulation.histogram import ERROR, Histogram

VALUES = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e9), st.integers(0, 100).map(float)), min_size=1
)
PERCENTS = (1, 50, 90, 99, 99.9, 100)


@given(VALUES)
def test_percentiles_are_off_by_one_per_cent_at_most(values: list[float]) -> None:
    one, bulk = Histogram(), Histogram()
    for value in values:
        one.add(value)
    bulk.add_all(np.array(values))
    for percent in PERCENTS:
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert one.percentile(percent) == pytest.approx(exact, rel=ERROR * 1.0001, abs=1e-7)
        assert bulk.percentile(percent) == one.percentile(percent)
    assert one.mean == pytest.approx(np.mean(values)) and bulk.greatest == max(values)
    assert one.count == bulk.count == len(values)


@given(VALUES, VALUES)
def test_merging_is_counting_both(first: list[float], second: list[float]) -> None:
    merged, other, both = Histogram(), Histogram(), Histogram()
    merged.add_all(np.array(first))
    other.add_all(np.array(second))
    both.add_all(np.array(first + second))
    merged.merge(other)
    for percent in PERCENTS:
        assert merged.percentile(percent) == both.percentile(percent)
    assert (merged.count, merged.least) == (both.count, both.least)
