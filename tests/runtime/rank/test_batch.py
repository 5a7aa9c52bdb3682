"""What every KVP group computes, together, is plain causal attention over everything so far.

A step is replayed on all groups with caches that hold (request, position) instead of keys: each row
must see, over all groups, exactly the positions up to its own, once each; and whoever computes a row must
hear of all who saw any of them.
"""

from __future__ import annotations

import random
from array import array
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.microbatch import Batch, Segments
from mnemoc.runtime.protocol.messages import Admission, Change, MorePages, Step
from mnemoc.runtime.rank.batch import Batches, Wanted
from mnemoc.runtime.rank.sequences import Sequences
from mnemoc.runtime.request import Logits, Sampling
from mnemoc.runtime.scheduling.growth import Growth

PAGE, NUM_PAGES = 4, 80
CPU = torch.device("cpu")
Row = tuple[int, int]  # request, position
PREEMPTED = 100
"""What is added to a request's id each time that it comes again."""


class Group:
    """One KVP group: its state, and a cache of (request, position) by slot."""

    def __init__(self, growth: Growth, group: int, overlap_rows: int = 0) -> None:
        self.sequences = Sequences(growth, group, PAGE, CPU)
        self.batches = Batches(growth, PAGE, range(growth.kvp), CPU, overlap_rows)
        self.cache: dict[int, Row] = {}

    def run(self, step: Step) -> tuple[Batch | None, list[Wanted], list[Row]]:
        decodes, chunks, _ = self.sequences.apply(step)
        if not decodes and not chunks:
            return None, [], []
        batch, wanted = self.batches.build(decodes, chunks)
        rows = [(part.sequence.id % PREEMPTED, part.cached) for part in decodes]
        second: list[Row] = []
        for part in chunks:
            ours = [(part.sequence.id % PREEMPTED, part.cached + i) for i in range(part.rows)]
            halved = 0 < self.batches.overlap_rows <= part.rows
            halved &= self.sequences.growth.seen_by(part.cached + part.rows) > 1
            half = -(-part.rows // 2) if halved else part.rows
            rows += ours[:half]
            second += ours[half:]
        assert batch.halves == (len(rows), len(second))
        rows += second
        assert batch.pos.tolist() == [position for _, position in rows]
        for row, slot in zip(rows, batch.slots.tolist(), strict=True):
            if slot >= 0:
                self.cache[slot] = row
        return batch, wanted, rows

    def seen(self, segments: Segments, first_row: int) -> dict[int, list[Row]]:
        """By batch row, what the kernels' contract lets it see."""
        seen = {}
        for s in range(segments.count):
            start, end = segments.rows[s : s + 2].tolist()
            for i in range(end - start):
                keys = min(int(segments.past[s]) + i + 1, int(segments.kv_len[s]))
                slots = [int(segments.pages[s, j // PAGE]) * PAGE + j % PAGE for j in range(keys)]
                seen[first_row + start + i] = [self.cache[slot] for slot in slots]
            assert end - start <= segments.max_rows
            assert int(segments.kv_len[s]) <= segments.max_kv
        return seen


class Pages:
    """The engine's part: who holds which pages of each group. They are given in any order."""

    def __init__(self, growth: Growth, choose: random.Random) -> None:
        self.growth = growth
        self.free = [choose.sample(range(NUM_PAGES), NUM_PAGES) for _ in range(growth.kvp)]
        self.held: dict[int, list[list[int]]] = {}

    def admit(
        self,
        id: int,
        home: int,
        prompt: int,
        new: int,
        logits: Logits = "none",
        room: int | None = None,
    ) -> Admission:
        """A request, with pages for its first `room` tokens (None: for all)."""
        ids = array("i", [(id * 31 + position) % 97 for position in range(prompt)])
        self.held[id] = [[] for _ in self.free]
        self.more(id, home, prompt + new - 1 if room is None else room)
        return Admission(id, home, prompt + new - 1, Sampling(), logits, ids, 0, 0, self.runs(id))

    def runs(self, id: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        return tuple(tuple((page, 1) for page in pages) for pages in self.held[id])

    def more(self, id: int, home: int, tokens: int) -> list[MorePages]:
        """What a request lacks for so many tokens."""
        given = []
        for group, pages in enumerate(self.held[id]):
            held = self.growth.held(self.growth.shard(home, group), tokens)
            new = [self.free[group].pop() for _ in range(-(-held // PAGE) - len(pages))]
            pages.extend(new)
            if new:
                given.append(MorePages(id, group, tuple((page, 1) for page in new)))
        return given

    def drop(self, id: int) -> None:
        for free, pages in zip(self.free, self.held.pop(id), strict=True):
            free.extend(pages)


@dataclass
class Live:
    """A request as the engine sees it. tokens: prompt and answer; prefilled: those that come as chunks."""

    id: int
    home: int
    tokens: array[int]
    generated: int
    prefilled: int
    cached: int
    end: int

    def preempt(self, choose: random.Random, pages: Pages) -> list[Change]:
        """It goes, and comes back with some of its tokens still in its pages."""
        old, self.id = self.id, self.id + PREEMPTED
        self.cached = choose.randint(0, min(self.cached, len(self.tokens) - 1))
        self.prefilled = len(self.tokens)
        pages.held[self.id] = pages.held.pop(old)
        runs = pages.runs(self.id)
        tokens = array("i", self.tokens)
        back = Admission(
            *(self.id, self.home, self.end, Sampling(), "none"),
            *(tokens, self.generated, self.cached, runs),
        )
        return [old, back]


@given(
    st.builds(Growth, st.integers(1, 4), st.integers(1, 30), st.booleans()),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=4),
    st.sampled_from([0, 0, 2, 9]),
    st.integers(0, 2**32),
)
def test_all_groups_together_see_every_token_once(
    growth: Growth, requests: list[tuple[int, int]], overlap_rows: int, seed: int
) -> None:
    """Whatever pages they are on, as they grow page by page, and come back after they were preempted; in
    whole chunks and in halves.
    """
    choose = random.Random(seed)
    groups = [Group(growth, group, overlap_rows) for group in range(growth.kvp)]
    pages = Pages(growth, choose)
    changes: list[Change] = []
    live: list[Live] = []
    for id, (prompt, new) in enumerate(requests):
        come = pages.admit(id, choose.randrange(growth.kvp), prompt, new, room=0)
        live.append(Live(id, come.home, array("i", come.tokens), 0, prompt, 0, come.kv_tokens))
        changes.append(come)
    while live:
        for one in live:
            if choose.random() < 0.1:
                changes += one.preempt(choose, pages)
        chunks = {
            one.id: choose.randint(1, min(25, one.prefilled - one.cached))
            for one in live
            if one.cached < one.prefilled and choose.random() < 0.6
        }
        decoding = [one for one in live if one.cached >= one.prefilled]
        cached = {one.id: one.cached for one in live}
        for one in decoding:
            one.tokens.append(7)
            one.generated += 1
        for one in live:
            one.cached += chunks.get(one.id, 1 if one in decoding else 0)
            changes += pages.more(one.id, one.home, one.cached)
        decodes = [(one.id, 7) for one in decoding]
        expect(groups, Step(0, changes, decodes, list(chunks.items())), cached)
        changes = [one.id for one in live if one.cached == one.end]
        for gone in changes:
            assert isinstance(gone, int)
            pages.drop(gone)
        live = [one for one in live if one.cached < one.end]


def expect(groups: list[Group], step: Step, cached: dict[int, int]) -> None:
    """Run the step on all groups and compare what its rows see with causal attention."""
    want = {
        (id % PREEMPTED, cached[id] + i): [
            (id % PREEMPTED, position) for position in range(cached[id] + i + 1)
        ]
        for id, rows in [(id, 1) for id, _ in step.decodes] + list(step.chunks)
        for i in range(rows)
    }
    seen: dict[Row, list[Row]] = defaultdict(list)
    sent: dict[tuple[int, int, int], list[Row]] = {}
    received: dict[tuple[int, int, int], list[Row]] = {}
    holders: dict[Row, set[int]] = defaultdict(set)
    computed: dict[int, list[Row]] = {}
    answers: list[Row] = []
    for number, group in enumerate(groups):
        batch, wanted, rows = group.run(step)
        if batch is None:
            continue
        parts = group.seen(batch.decode, 0) if batch.decode else {}
        if batch.prefill:
            parts |= group.seen(batch.prefill, batch.num_decode)
        first_rows, _ = batch.halves
        swaps = [(0, swap) for swap in batch.exchange]
        if batch.second:
            parts |= group.seen(batch.second.prefill, first_rows)
            swaps += [(1, swap) for swap in batch.second.exchange]
        assert sorted(parts) == list(range(len(rows)))
        for row, keys in parts.items():
            seen[rows[row]] += keys
            holders[rows[row]] |= {number} if keys else set()
        computed[number] = rows
        for half, swap in swaps:
            own = rows[first_rows:] if half else rows[:first_rows]
            sent[number, swap.peer, half] = [own[i] for i in swap.sent.tolist()]
            received[swap.peer, number, half] = [own[i] for i in swap.received.tolist()]
        assert len(wanted) == batch.last.shape[0]
        answers += [rows[i] for i in batch.last.tolist()]
    assert {row: sorted(keys) for row, keys in seen.items()} == want
    assert sent == received
    for number, rows_ in computed.items():
        for row_ in rows_:
            heard = {
                peer
                for peer in computed
                if any(row_ in sent.get((peer, number, half), ()) for half in (0, 1))
            }
            assert holders[row_] <= heard | {number}
    if groups[0].sequences.growth.helix:
        assert all(sorted(rows_) == sorted(want) for rows_ in computed.values())
        assert len(computed) == len(groups) or not want
    assert len(set(answers)) == len(answers), "one group answers for a row"
    assert {id % PREEMPTED for id, _ in step.decodes} <= {id for id, _ in answers}


def test_rows_that_no_peer_shares_are_not_swapped() -> None:
    growth = Growth(kvp=2, stripe_tokens=10)
    groups = [Group(growth, 0), Group(growth, 1)]
    pages = Pages(growth, random.Random(0))
    come = [pages.admit(0, 0, 15, 2), pages.admit(1, 1, 4, 2)]
    step = Step(0, come, [], [(0, 15), (1, 4)])
    (first, _, _), (second, _, _) = (group.run(step) for group in groups)
    assert first is not None
    assert second is not None
    assert (first.pos.shape[0], second.pos.shape[0]) == (15, 19)
    (ours,), (theirs,) = first.exchange, second.exchange
    for rows in (ours.sent, ours.received, theirs.sent, theirs.received):
        assert rows.tolist() == list(range(15))
    assert second.prefill is not None
    assert second.prefill.past.tolist() == [-10, 0]
    assert second.slots.tolist()[:10] == [-1] * 10


def test_under_helix_all_groups_have_all_rows_in_one_order_and_blind_ones_only_listen() -> None:
    growth = Growth(kvp=2, stripe_tokens=10, helix=True)
    groups = [Group(growth, 0), Group(growth, 1)]
    pages = Pages(growth, random.Random(0))
    come = [pages.admit(0, 0, 15, 2), pages.admit(1, 1, 4, 2)]
    step = Step(0, come, [], [(0, 15), (1, 4)])
    (first, wanted, rows), (second, others, others_rows) = (group.run(step) for group in groups)
    assert first is not None
    assert second is not None
    assert rows == others_rows
    (ours,), (theirs,) = first.exchange, second.exchange
    assert ours.sent.tolist() == theirs.received.tolist() == list(range(15))
    assert ours.received.tolist() == theirs.sent.tolist() == list(range(19))
    assert first.prefill is not None
    assert first.prefill.kv_len.tolist() == [10, 0]
    assert first.prefill.pages.shape[0] == 2
    assert first.slots.tolist()[15:] == [-1] * 4
    assert (wanted, [want.sequence.id for want in others]) == ([], [0, 1])


@pytest.mark.parametrize(
    ("logits", "rows", "send"),
    [("none", [5], 0), ("last", [5], 1), ("all", [0, 1, 2, 3, 4, 5], 6), ((9, 1, 3), [1, 3, 5], 3)],
)
def test_logits_are_made_for_the_rows_that_are_asked_for(
    logits: Logits, rows: list[int], send: int
) -> None:
    growth = Growth(1, 100)
    come = Pages(growth, random.Random(0)).admit(0, 0, 6, 2, logits)
    batch, wanted, _ = Group(growth, 0).run(Step(0, [come], [], [(0, 6)]))
    assert batch is not None
    assert batch.last.tolist() == rows
    assert [(w.position, w.sample, w.send) for w in wanted] == [(rows[0], True, send)]


def test_the_page_table_is_one_tensor_that_grows_as_long_as_the_same_are_together() -> None:
    growth = Growth(1, 100)
    group, pages = Group(growth, 0), Pages(growth, random.Random(0))
    come = [pages.admit(0, 0, 6, 9, room=8), pages.admit(1, 0, 3, 9, room=4)]
    group.run(Step(0, come, [], [(0, 6), (1, 3)]))
    tables = []
    for number in range(5):
        more = [*pages.more(0, 0, 7 + number), *pages.more(1, 0, 4 + number)]
        batch, _, _ = group.run(Step(number, more, [(0, 1), (1, 1)], []))
        assert batch is not None
        assert batch.decode is not None
        group.seen(batch.decode, 0)
        tables.append(batch.decode.pages)
    assert all(table is tables[0] for table in tables)
    held = [pages.held[id][0] for id in (0, 1)]
    assert [len(pages) for pages in held] == [3, 2]
    assert tables[0].tolist() == [[*held[0], 0], [*held[1], 0, 0]]
