"""The block manager: no page is lost, shared or handed out twice, whatever comes and goes."""

from __future__ import annotations

import itertools
from unittest.mock import ANY

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from mnemoc.runtime.protocol.messages import Copies, MorePages
from mnemoc.runtime.scheduling.growth import Growth
from mnemoc.runtime.scheduling.pages import PageBook
from mnemoc.runtime.scheduling.pool import PagePool
from mnemoc.runtime.scheduling.prefix import page_hash, page_hashes

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
        runs = self.pool.take(count)
        if count <= whole:
            assert len(runs) <= 1, "a run that is long enough was cut"
        self.held[self.next] = [start + i for start, size in runs for i in range(size)]
        assert len(self.held[self.next]) == count
        self.next += 1
        return self.next - 1

    @rule(request=consumes(requests))
    def release(self, request: int) -> None:
        for page in self.held.pop(request):
            self.pool.give(page, 1)

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
        assert growth.read(shard, cached, rows) == sum(piece.kv_len for piece in pieces)
        stripes = [first for first, _ in growth.stored(shard, cached, rows)]
        assert len(pieces) <= 1 + len(stripes)


@given(growths, st.lists(st.tuples(st.integers(1, 120), st.integers(0, 3)), max_size=12))
def test_a_request_gets_pages_on_all_its_groups_or_on_none(
    growth: Growth, wanted: list[tuple[int, int]]
) -> None:
    book = PageBook(growth, NUM_PAGES, page_size=4)
    inside = []
    for sid, (tokens, number) in enumerate(wanted):
        home = number % growth.kvp
        free = [book.available(group) for group in range(growth.kvp)]
        needs = book.needs(tokens)
        groups = [growth.group(home, shard) for shard in range(len(needs))]
        enough = all(free[g] >= count for g, count in zip(groups, needs, strict=True))
        assert book.fits(home, tokens) == enough
        if enough:
            pages = book.admit(sid, home, tokens)
            inside.append(sid)
            for g, count in zip(groups, needs, strict=True):
                free[g] -= count
                assert sum(size for _, size in pages[g]) == count
        assert [book.available(group) for group in range(growth.kvp)] == free
    for sid in inside:
        book.release(sid)
    assert book.used_fraction == 0
    assert book.changes == inside


ALONE = Growth(1, 1000)
TOKENS = list(range(40))
HASHES = page_hashes(TOKENS, 4)


def filled(book: PageBook, sid: int, tokens: int = 40, hashes: list[bytes] = HASHES) -> None:
    """A request that has come, filled its pages, and gone, to come again."""
    book.admit(sid, 0, tokens)
    book.fill(sid, hashes, tokens)
    book.release(sid, returns=True)
    book.changes.clear()


def found(book: PageBook, hashes: list[bytes]) -> int:
    return book.found(0, hashes, len(hashes))


def test_hashes_name_a_page_with_all_that_is_before_it() -> None:
    assert len(HASHES) == 10
    assert page_hashes([*TOKENS[:9], 99, *TOKENS[10:]], 4)[:3] == [*HASHES[:2], ANY]
    assert len(set(page_hashes([7] * 40, 4))) == 10
    assert page_hash(HASHES[3], TOKENS[16:20]) == HASHES[4]
    assert page_hashes(range(40), 4) == HASHES, "whatever holds the tokens"


def test_a_prefix_is_found_again_and_its_pages_are_shared() -> None:
    book = PageBook(ALONE, 20, 4)
    first = book.admit(0, 0, 40)
    book.fill(0, HASHES, 26)
    assert found(book, HASHES) == 6, "whole pages only"
    assert found(book, page_hashes([*TOKENS[:12], 5], 4)) == 3
    second = book.admit(1, 0, 40, HASHES[:6])
    assert first == (((0, 10),),)
    assert second == (((0, 6), (10, 4)),)
    book.release(0)
    assert book.available(0) == 20 - 10, "what the second reads stays"
    book.release(1)
    assert book.used_fraction == 0
    assert found(book, HASHES) == 6


def test_the_blocks_idle_for_longest_go_first_and_a_prefix_is_left() -> None:
    book = PageBook(ALONE, 20, 4)
    others = page_hashes([7] * 40, 4)
    filled(book, 0)
    filled(book, 1, hashes=others)
    book.admit(2, 0, 16)
    assert (found(book, HASHES), found(book, others)) == (6, 10)
    book.admit(3, 0, 28)
    assert (found(book, HASHES), found(book, others)) == (0, 9)


def test_what_is_evicted_goes_to_the_host_if_it_is_deep_enough_and_comes_back() -> None:
    book = PageBook(ALONE, 10, 4, host_pages=3, swap_from=16)
    filled(book, 0)
    book.admit(1, 0, 20)
    (out,) = book.changes
    assert out == Copies(0, True, [(9, 0), (8, 1), (7, 2), (6, 0), (5, 1)]), (
        "the last ones make way"
    )
    assert found(book, HASHES) == 8
    book.release(1)
    book.changes.clear()
    book.admit(2, 0, 40, HASHES[:8])
    (back,) = (change for change in book.changes if isinstance(change, Copies) and not change.out)
    assert sorted(slot for _, slot in back.pairs) == [0, 1, 2]
    assert (book.swapped_out, book.swapped_in) == (5, 3)
    book.audit()


def test_pages_that_nobody_has_come_for_are_not_worth_a_copy() -> None:
    book = PageBook(ALONE, 10, 4, host_pages=10, swap_from=0)
    for sid in (0, 1):
        book.admit(sid, 0, 40, HASHES[: found(book, HASHES)] if sid else ())
        book.fill(sid, HASHES, 20 + 20 * sid)
        book.release(sid)
    book.admit(2, 0, 40)
    assert book.swapped_out == 5, (
        "the first five were found by the second request, the others by none"
    )
    book.audit()


def test_a_slot_that_is_read_back_is_not_written_before() -> None:
    book = PageBook(ALONE, 10, 4, host_pages=12, swap_from=0)
    filled(book, 0)
    filled(book, 1, hashes=page_hashes([7] * 40, 4))
    book.admit(2, 0, 40, HASHES)
    *outs, back = (change for change in book.changes if isinstance(change, Copies))
    assert not back.out
    read = {slot for _, slot in back.pairs}
    written = {slot for out in outs for _, slot in out.pairs}
    assert (len(read), len(written)) == (10, 2)
    assert not read & written
    book.audit()


def test_pages_that_stripes_cut_are_not_shared() -> None:
    book = PageBook(Growth(2, 10), 20, 4)
    book.admit(0, 0, 40)
    book.fill(0, HASHES, 40)
    assert found(book, HASHES) == 0


def test_a_request_grows_by_pages_where_there_are_some_and_is_told_where_not() -> None:
    book = PageBook(ALONE, 4, 4)
    book.admit(0, 0, 8)
    assert book.extend(0, 12) is None
    assert book.changes == [MorePages(0, 0, ((2, 1),))]
    book.admit(1, 0, 4)
    assert book.extend(0, 16) == 0
    assert (book.holds(0, 0), book.available(0)) == (True, 0)
