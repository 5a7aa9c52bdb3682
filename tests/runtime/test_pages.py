"""The block manager: no page is lost, shared or handed out twice, whatever comes and goes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from mnemoc.runtime.growth import Growth
from mnemoc.runtime.pages import PageBook, PagePool

NUM_PAGES = 23


class Pool(RuleBasedStateMachine):
    """A pool beside the plainest model of it: a set of pages per request."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.held: dict[int, list[int]] = {}
        self.next = 0

    @rule(target=requests, share=st.floats(0, 1))
    def reserve(self, share: float) -> int:
        count = round(share * self.pool.num_free)
        whole = max((size for _, size in self.pool._free), default=0)
        runs = self.pool.reserve(self.next, count)
        if count <= whole:
            assert len(runs) <= 1, "a run that is long enough was cut"
        self.held[self.next] = [start + i for start, size in runs for i in range(size)]
        assert len(self.held[self.next]) == count
        self.next += 1
        return self.next - 1

    @rule(request=consumes(requests))
    def release(self, request: int) -> None:
        self.pool.release(request)
        del self.held[request]

    @invariant()
    def no_page_is_lost_or_shared(self) -> None:
        taken = [page for pages in self.held.values() for page in pages]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(NUM_PAGES))
        assert self.pool.num_free == NUM_PAGES - len(taken)

    @invariant()
    def free_runs_are_sorted_and_joined(self) -> None:
        ends = [(start, start + size) for start, size in self.pool._free]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))


TestPool = Pool.TestCase


growths = st.builds(Growth, kvp=st.integers(1, 5), stripe_tokens=st.integers(1, 50))


@given(growths, st.integers(1, 300))
def test_each_position_lies_in_one_shard_behind_the_shards_earlier_ones(
    growth: Growth, tokens: int
) -> None:
    held = [0] * growth.kvp
    for position in range(tokens):
        owner = growth.owner(position)
        assert growth.held(owner, position) == held[owner]
        held[owner] += 1
        assert [growth.held(shard, position + 1) for shard in range(growth.kvp)] == held
        assert held[0] == max(held), "home holds the most"
        active = growth.shards(position + 1)
        assert [count > 0 for count in held] == [shard < active for shard in range(growth.kvp)]


@given(growths, st.integers(0, 300), st.integers(1, 200))
def test_the_shards_store_each_token_of_a_chunk_once(
    growth: Growth, cached: int, rows: int
) -> None:
    stored = {}
    for shard in range(growth.kvp):
        for first, end in growth.stored(shard, cached, rows):
            stored |= dict.fromkeys(range(first, end), shard)
    assert stored == {position: growth.owner(position) for position in range(cached, cached + rows)}


@given(growths, st.integers(0, 300), st.integers(1, 200))
def test_pieces_show_each_query_the_keys_up_to_its_own(
    growth: Growth, cached: int, rows: int
) -> None:
    for shard in range(growth.kvp):
        pieces = list(growth.pieces(shard, cached, rows))
        seen = [
            max(0, min(piece.past + i + 1, piece.kv_len))
            for piece in pieces
            for i in range(piece.rows)
        ]
        by_hand = [growth.held(shard, query + 1) for query in range(cached, cached + rows)]
        assert seen == by_hand
        assert growth.pairs(shard, cached, rows) == sum(by_hand)
        stripes = [first for first, _ in growth.stored(shard, cached, rows)]
        assert len(pieces) <= 1 + len(stripes)


@given(growths, st.lists(st.tuples(st.integers(1, 120), st.integers(0, 3)), max_size=12))
def test_a_request_gets_pages_on_all_its_groups_or_on_none(
    growth: Growth, wanted: list[tuple[int, int]]
) -> None:
    book = PageBook(growth, NUM_PAGES, page_size=4)
    inside = []
    for request, (tokens, number) in enumerate(wanted):
        home = number % growth.kvp
        free = [book.free(group) for group in range(growth.kvp)]
        needs = book.needs(tokens)
        groups = [growth.group(home, shard) for shard in range(len(needs))]
        enough = all(free[g] >= count for g, count in zip(groups, needs, strict=True))
        assert book.fits(home, tokens) == enough
        if enough:
            book.reserve(request, home, tokens)
            inside.append((request, home, tokens))
            for g, count in zip(groups, needs, strict=True):
                free[g] -= count
        assert [book.free(group) for group in range(growth.kvp)] == free
    for request, home, tokens in inside:
        book.release(request, home, tokens)
    assert book.used_fraction == 0
