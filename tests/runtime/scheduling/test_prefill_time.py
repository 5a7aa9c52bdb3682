"""How long a prompt takes alone, by the plan's chunks."""

from __future__ import annotations

import itertools

import pytest
from mnemoc.runtime.scheduling.cost import PrefillTime
from mnemoc.runtime.scheduling.growth import Growth

from .conftest import PLAN, Rate


def test_predicted_prefill_time_is_the_sum_over_the_plans_chunks() -> None:
    time = PrefillTime(PLAN, Rate(), Growth(1, 1000), context=200, points=1000)
    by_hand, n, sums = 0.0, 0, {}
    while n < 200:
        chunk = PLAN.chunk_at(n)
        by_hand += chunk * 1e-3 + (chunk * n + chunk * (chunk + 1) // 2) * 1e-6
        n += chunk
        sums[n] = by_hand
    for tokens, seconds in sums.items():
        assert time.until_s(tokens) == pytest.approx(seconds)
    assert time.until_s(25) == pytest.approx(25e-3 + 25 * 26 / 2 * 1e-6), "a chunk cut short"


def test_what_is_left_of_a_prompt_falls_evenly_within_a_chunk_too() -> None:
    time = PrefillTime(PLAN, Rate(), Growth(1, 1000), context=200, points=1000)
    whole_s = time.until_s(200)
    left_s = [time.left_s(whole_s, tokens) for tokens in range(201)]
    assert left_s[0] == whole_s
    assert left_s[200] == pytest.approx(0.0)
    assert all(after < before for before, after in itertools.pairwise(left_s))
    tokens = 0
    while (tokens := tokens + PLAN.chunk_at(tokens)) < 200:
        assert left_s[tokens] == pytest.approx(whole_s - time.until_s(tokens))


def test_predicted_prefill_time_of_a_long_context_is_sampled_closely_enough() -> None:
    growth = Growth(1, 10**9)
    sampled = PrefillTime(PLAN, Rate(), growth, context=200_000)
    exact = PrefillTime(PLAN, Rate(), growth, context=200_000, points=200_000)
    for tokens in (1_000, 50_000, 123_456, 200_000):
        assert sampled.until_s(tokens) == pytest.approx(exact.until_s(tokens), rel=1e-3)
