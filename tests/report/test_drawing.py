"""Axes have round ticks within their range, and values land where they should."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.codegen.report.drawing import Scale, ceiling, element, number

positive = st.floats(1e-6, 1e9)
most = st.integers(2, 12)


@given(positive, st.floats(1.01, 1e6), most)
def test_linear_ticks_are_few_round_and_within(low, times, count):
    scale = Scale(low, low * times, 0.0, 100.0)
    ticks = scale.ticks(count)
    assert len(ticks) <= count
    for tick in ticks:
        assert scale.low * (1 - 1e-6) <= tick <= scale.high * (1 + 1e-6)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        digit = step / 10.0 ** math.floor(math.log10(step * (1 + 1e-9)))
        assert any(digit == pytest.approx(d) for d in (1, 2, 5, 10))


@given(positive, st.floats(1.5, 1e8), most)
def test_log_ticks_are_few_and_within(low, times, count):
    scale = Scale(low, low * times, 0.0, 100.0, log=True)
    ticks = scale.ticks(count)
    assert len(ticks) <= count
    assert ticks == sorted(ticks)
    for tick in ticks:
        assert -1e-3 <= scale(tick) <= 100 + 1e-3


@given(positive, st.floats(1.01, 1e6), st.booleans())
def test_a_scale_runs_from_end_to_end_and_rises(low, times, log):
    scale = Scale(low, low * times, 20.0, 320.0, log=log)
    assert scale(scale.low) == pytest.approx(20)
    assert scale(scale.high) == pytest.approx(320)
    middle = math.sqrt(scale.low * scale.high)
    assert 20 < scale(middle) < 320


@given(st.floats(1e-9, 1e12))
def test_an_axis_ends_little_above_what_it_shows(value):
    assert value * (1 - 1e-9) <= ceiling(value) <= 1.4 * value


def test_attributes_and_text_are_escaped():
    assert str(element("text", "a < b", class_='"x"', data_i=3, x=1.04)) == (
        '<text class="&#34;x&#34;" data-i="3" x="1">a &lt; b</text>'
    )
    assert [number(v) for v in (1.0, 2.26, -0.01)] == ["1", "2.3", "0"]
