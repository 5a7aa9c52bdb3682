"""Buckets, menu and quantities, against plain counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.planner.chunks import (
    Riders,
    Sizes,
    Spread,
    bounded,
    chunk_unit,
    decode_sizes,
    make_grid,
    prefill_sizes,
    sample,
)
from mnemoc.planner.space import uncrossed
from mnemoc.runtime.scheduling.cost import Load
from mnemoc.runtime.scheduling.growth import Growth

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
    stripe=st.integers(1, 120),
    ring=st.none() | st.integers(1, 5),
    peers=st.integers(0, 6),
)
def test_quantities_equal_counting_key_by_key(
    start: int, size: int, stripe: int, ring: int | None, peers: int
) -> None:
    end = start + size
    groups = ring or -(-end // stripe)
    held = [0] * groups
    pairs = [0] * groups
    for position in range(end):
        held[position // stripe % groups] += 1
        if position >= start:
            pairs = [pair + keys for pair, keys in zip(pairs, held, strict=True)]
    active = sum(keys > 0 for keys in held)
    spread, chunk = Spread(stripe, ring), (np.array(float(start)), np.array(float(size)))
    sizes = prefill_sizes(*chunk, spread, ALONE)
    assert (pairs[0], held[0]) == (max(pairs), max(held)), "home is the busiest"
    assert (pairs[0], held[0], size * (active - 1)) == (sizes.QK, sizes.KV, sizes.X)
    assert spread.active(np.array(float(end))) == active
    ridden = prefill_sizes(*chunk, spread, Riders(peers, 7, 3))
    expected = (size + peers, 7 * peers, size * (active - 1) + 2 * peers)
    assert expected == (ridden.T, ridden.KD, ridden.X)


@given(
    growth=st.builds(Growth, st.integers(1, 5), st.integers(1, 60), st.booleans()),
    start=st.integers(0, 400),
    size=st.integers(1, 80),
)
def test_the_scheduler_counts_a_chunk_as_the_planner_does(
    growth: Growth, start: int, size: int
) -> None:
    """On its home group. The scheduler counts keys again that a chunk reads in a further piece."""
    spread = Spread(growth.stripe_tokens, growth.kvp, growth.kvp if growth.helix else None)
    planned = prefill_sizes(np.array(float(start)), np.array(float(size)), spread, ALONE)
    load = Load()
    load.add_chunk(growth, 0, start, size, ends=False)
    assert (planned.T, planned.QK, planned.X) == (load.T, load.QK, load.X)
    pieces = list(growth.pieces(0, start, size))
    assert pieces[-1].kv_len == planned.KV
    assert sum(piece.kv_len for piece in pieces) == load.KV


def test_under_helix_all_groups_compute_all_rows_and_blind_ones_bring_no_keys() -> None:
    spread, start, size = Spread(100, None, 4), np.array(50.0), np.array(20.0)
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


@settings(max_examples=150, deadline=None)
@given(
    context=st.integers(1, 60_000),
    groups=st.integers(1, 5),
    rounds=st.integers(1, 12),
    intensity=st.sampled_from([0, 1, 40, 1000]),
    data=st.data(),
)
def test_samples_bound_the_sum_over_a_bucket_from_above_and_closely(
    context: int, groups: int, rounds: int, intensity: int, data: st.DataObject
) -> None:
    grid = make_grid(context)
    stripe = -(-context // groups)
    if rounds > 1 and groups > 1:
        stripe = min(stripe, uncrossed(context // groups // rounds, chunk_unit(context), 16))
    spread = Spread(stripe, groups if groups * stripe < context else None)
    samples = sample(grid, spread)
    b = data.draw(st.integers(0, len(grid.starts) - 1))
    c = data.draw(st.integers(0, len(grid.menu) - 1))
    if not samples.allowed[b, c]:
        return

    def seconds(z: Sizes) -> np.ndarray:
        return 1 + np.maximum(z.QK, intensity * z.KV) + 3 * z.T + 2 * z.X

    sizes = prefill_sizes(samples.start, samples.size, spread, ALONE)
    priced = bounded(sizes, samples, spread)
    weights = samples.weight[:, b, c]
    starts = np.arange(grid.starts[b], grid.ends[b], grid.menu[c], dtype=float)
    size = np.minimum(grid.menu[c], grid.ends[b] - starts)
    each = prefill_sizes(starts, size, spread, ALONE)
    summed, exact = (weights * seconds(priced)[:, b, c]).sum(), seconds(each).sum()
    first, last = (spread.active(np.array(edge)) for edge in (starts[0] + 1, grid.ends[b]))
    joining = last - first
    dearest = seconds(each).max() * len(starts)
    off = 0 if spread.ring is None else intensity * size.sum() / 2  # of KV, half a chunk of each
    closely = (exact + off if joining < 2 else dearest) * 1.1
    assert exact * (1 - 1e-9) <= summed <= closely
    assert (weights >= 0).all()
    assert (weights * samples.size[:, b, c]).sum() == pytest.approx(size.sum())
    if joining < 2:
        pairs = (weights * priced.QK[:, b, c]).sum()
        assert pairs == pytest.approx(each.QK.sum()), "exact but where further groups join"


def test_the_whole_sum_of_a_long_prompt_is_close_whatever_the_stripes() -> None:
    """Samples over a direct sum over all chunks of 10 M tokens on 4 groups."""
    grid = make_grid(10**7)
    entry = grid.menu.index(480)
    for stripe in (2_500_000, 40 * 13_440, 5 * 13_440):
        spread = Spread(stripe, 4 if 4 * stripe < 10**7 else None)
        samples = sample(grid, spread)
        sizes = prefill_sizes(samples.start, samples.size, spread, ALONE)
        priced = bounded(sizes, samples, spread)
        starts = np.arange(0, 10**7, 480, dtype=float)
        each = prefill_sizes(starts, np.minimum(480, 10**7 - starts), spread, ALONE)

        def seconds(z: Sizes) -> np.ndarray:
            return np.maximum(z.QK, 500 * z.KV) + 1e5 * z.T + 1e5 * z.X

        summed = (samples.weight * seconds(priced))[:, :, entry].sum()
        exact = seconds(each).sum()
        assert exact <= summed <= exact * 1.01


def test_a_first_chunk_that_fills_the_home_group_does_not_stand_for_the_dearer_ones_after_it() -> (
    None
):
    """Chunks of 48 from 1,920 on: the first sees fewer keys than all others of its bucket."""
    samples = sample(make_grid(5764), Spread(1922))
    pairs = prefill_sizes(samples.start, samples.size, Spread(1922), ALONE).QK
    starts = np.arange(1920, 3840, 48, dtype=float)
    exact = prefill_sizes(starts, np.full_like(starts, 48), Spread(1922), ALONE).QK
    assert exact[0] < exact[1] == exact[-1]
    assert (samples.weight * pairs).sum(axis=0)[1, 2] == pytest.approx(exact.sum())


def test_chunks_that_would_cross_a_stripe_are_not_allowed() -> None:
    grid, spread = make_grid(9000), Spread(480, 4)
    allowed = sample(grid, spread).allowed
    for entry, size in enumerate(grid.menu):
        assert allowed[0, entry] == (480 % size == 0)
    assert sample(grid, Spread(2250)).allowed[0].all()
