"""Buckets, menu and quantities, against plain counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.planner.chunks import (
    Riders,
    Spread,
    active_groups,
    decode_sizes,
    make_grid,
    prefill_sizes,
    sample,
)

ALONE = Riders(0, 0, 1)


@pytest.mark.parametrize("context", [1, 15, 16, 100, 1920, 1921, 8192, 131_072, 10_000_000])
def test_buckets_tile_the_context_and_chunks_tile_their_buckets(context: int) -> None:
    grid = make_grid(context)
    assert grid.starts[0] == 0
    assert grid.ends[-1] == context
    assert grid.starts[1:] == grid.ends[:-1]
    for start, end in zip(grid.starts[:-1], grid.ends[:-1], strict=True):
        assert all((end - start) % chunk == 0 for chunk in grid.menu)
    assert len(grid.starts) < 50


def test_later_buckets_are_larger_but_never_large() -> None:
    grid = make_grid(10_000_000)
    for start, end in zip(grid.starts[8:], grid.ends[8:], strict=True):
        assert (end - start) / start <= 0.26


@given(
    start=st.integers(0, 300),
    size=st.integers(1, 80),
    group=st.integers(1, 120),
    peers=st.integers(0, 6),
)
def test_quantities_equal_counting_key_by_key(
    start: int, size: int, group: int, peers: int
) -> None:
    queries = range(start, start + size)
    owner = (start + size - 1) // group
    per_group = [
        sum(1 for q in queries for key in range(q + 1) if key // group == g)
        for g in range(owner + 1)
    ]
    sizes = prefill_sizes(np.array(float(start)), np.array(float(size)), Spread(group), ALONE)
    assert per_group[0] == max(per_group)
    counted = (per_group[0], min(start + size, group), size * owner)
    assert counted == (sizes.QK, sizes.KV, sizes.X)
    assert active_groups(np.array(float(start + size)), group) == owner + 1
    ridden = prefill_sizes(
        np.array(float(start)), np.array(float(size)), Spread(group), Riders(peers, 7, 3)
    )
    expected = (size + peers, 7 * peers, size * owner + 2 * peers)
    assert expected == (ridden.T, ridden.KD, ridden.X)


def test_under_helix_all_groups_compute_all_rows_and_blind_ones_bring_no_keys() -> None:
    spread, start, size = Spread(100, groups=4), np.array(50.0), np.array(20.0)
    alone = prefill_sizes(start, size, spread, ALONE)
    assert (alone.T, alone.QK, alone.X) == (20, 50 * 20 + 210, 20 * 3)
    riders = Riders(count=2, tokens=100, groups=4, blind=3)
    ridden = prefill_sizes(start, size, spread, riders)
    assert (ridden.T, ridden.R, ridden.KD, ridden.X) == (25, 3, 200, 25 * 3)
    decodes = decode_sizes(riders)
    assert (decodes.T, decodes.R, decodes.KD, decodes.X) == (5, 2, 200, 15)


def test_decodes_alone_bring_no_prefill() -> None:
    sizes = decode_sizes(Riders(3, 100, 2))
    assert (sizes.T, sizes.R, sizes.QK, sizes.KV, sizes.KD, sizes.X) == (3, 3, 0, 0, 300, 3)


@settings(max_examples=50, deadline=None)
@given(context=st.integers(1, 40_000), parts=st.integers(1, 5), data=st.data())
def test_samples_bound_the_sum_over_a_bucket_from_above_and_closely(
    context: int, parts: int, data: st.DataObject
) -> None:
    grid = make_grid(context)
    group = -(-context // parts)
    samples = sample(grid, group)

    def seconds(start: np.ndarray, size: np.ndarray) -> np.ndarray:
        z = prefill_sizes(start, size, Spread(group), ALONE)
        return 1 + np.maximum(z.QK, 40 * z.KV) + 3 * z.T + z.X

    b = data.draw(st.integers(0, len(grid.starts) - 1))
    c = data.draw(st.integers(0, len(grid.menu) - 1))
    if not samples.allowed[b, c]:
        return
    bounded = (samples.weight * seconds(samples.start, samples.size)).sum(axis=0)[b, c]
    starts = np.arange(grid.starts[b], grid.ends[b], grid.menu[c], dtype=float)
    sizes = np.minimum(grid.menu[c], grid.ends[b] - starts)
    exact = seconds(starts, sizes).sum()
    assert exact * (1 - 1e-12) <= bounded <= exact * 1.25
    assert (samples.weight * samples.size).sum(axis=0)[b, c] == pytest.approx(sizes.sum())


def test_a_first_chunk_that_fills_the_home_group_does_not_stand_for_the_dearer_ones_after_it() -> (
    None
):
    """Chunks of 48 from 1,920 on: the first sees fewer keys than all others of its bucket."""
    samples = sample(make_grid(5764), 1922)
    pairs = prefill_sizes(samples.start, samples.size, Spread(1922), ALONE).QK
    starts = np.arange(1920, 3840, 48, dtype=float)
    exact = prefill_sizes(starts, np.full_like(starts, 48), Spread(1922), ALONE).QK
    assert exact[0] < exact[1] == exact[-1]
    assert (samples.weight * pairs).sum(axis=0)[1, 2] >= exact.sum()
