"""Quantities as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.errors import BadInput
from mnemoc.units import (
    format_bytes,
    format_count,
    format_duration,
    parse_count,
    parse_duration_s,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("128K", 128_000), ("10M", 10**7), ("1.5m", 1_500_000), ("1_000", 1000)],
)
def test_counts(text, count):
    assert parse_count(text, "--context") == count


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("400s", 400.0), ("30ms", 0.03), ("5min", 300.0), ("1.5h", 5400.0), ("250us", 250e-6)],
)
def test_durations(text, seconds):
    assert parse_duration_s(text, "--ttft") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "0", "ten", "1.5", "10X", "nan", "inf", "1e400", "1 0"])
def test_what_is_no_count_is_refused_with_what_was_got(text):
    with pytest.raises(BadInput, match="--context"):
        parse_count(text, "--context")


@pytest.mark.parametrize("text", ["", "-3s", "0s", "400", "soon", "1e999s", "s"])
def test_what_is_no_duration_is_refused_with_what_was_got(text):
    with pytest.raises(BadInput, match="--ttft"):
        parse_duration_s(text, "--ttft")


@given(st.integers(1, 10**13))
def test_any_integer_reads_as_itself(count):
    assert parse_count(str(count), "n") == count


def test_figures_are_shown_with_three_digits():
    assert format_count(1_340_000) == "1.34M"
    assert format_count(999) == "999"
    assert format_bytes(80 * 2**30) == "80 GiB"
    assert format_duration(0.0304) == "30.4 ms"
    assert format_duration(372.1) == "372 s"
    assert format_duration(7300) == "2 h 01 min"
    assert format_duration(float("inf")) == "never"
