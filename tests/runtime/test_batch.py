"""What every KVP group computes, together, is plain causal attention over everything so far.

A step is replayed on all groups with caches that hold (request, position) instead of keys: each row
must see, over all groups, exactly the positions up to its own, once each; and whoever computes a row must
hear of all who saw any of them.
"""

from __future__ import annotations

import random
from array import array
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.microbatch import Batch, Segments
from mnemoc.runtime.batch import Batches, Wanted
from mnemoc.runtime.growth import Growth
from mnemoc.runtime.protocol import Admission, Step
from mnemoc.runtime.request import Logits, Sampling
from mnemoc.runtime.sequences import Sequences

PAGE, NUM_PAGES = 4, 80
CPU = torch.device("cpu")
Row = tuple[int, int]  # request, position


class Group:
    """One KVP group: its state, and a cache of (request, position) by slot."""

    def __init__(self, growth: Growth, group: int) -> None:
        self.sequences = Sequences(growth, group, NUM_PAGES, PAGE, CPU)
        self.batches = Batches(growth, PAGE, range(growth.kvp), CPU)
        self.cache: dict[int, Row] = {}

    def run(self, step: Step) -> tuple[Batch | None, list[Wanted], list[Row]]:
        decodes, chunks = self.sequences.apply(step)
        if not decodes and not chunks:
            return None, [], []
        batch, wanted = self.batches.build(decodes, chunks)
        rows = [
            (part.sequence.id, part.cached + i)
            for part in [*decodes, *chunks]
            for i in range(part.rows)
        ]
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


def admit(id: int, home: int, prompt: int, new: int, logits: Logits = "none") -> Admission:
    ids = array("i", [(id * 31 + position) % 97 for position in range(prompt)])
    return Admission(id, home, prompt + new - 1, Sampling(), logits, ids)


@given(
    st.builds(Growth, st.integers(1, 4), st.integers(1, 30), st.booleans()),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_all_groups_together_see_every_token_once(
    growth: Growth, requests: list[tuple[int, int]], seed: int
) -> None:
    choose = random.Random(seed)
    groups = [Group(growth, group) for group in range(growth.kvp)]
    changes: list[Admission | int] = [
        admit(id, choose.randrange(growth.kvp), prompt, new)
        for id, (prompt, new) in enumerate(requests)
    ]
    prompts = {id: prompt for id, (prompt, _) in enumerate(requests)}
    ends = {id: prompt + new - 1 for id, (prompt, new) in enumerate(requests)}
    cached = dict.fromkeys(ends, 0)
    while ends:
        decodes = [(id, 7) for id in ends if cached[id] >= prompts[id]]
        chunks = [
            (id, choose.randint(1, min(25, prompts[id] - cached[id])))
            for id in ends
            if cached[id] < prompts[id] and choose.random() < 0.6
        ]
        expect(groups, Step(0, changes, decodes, chunks), cached)
        for id, rows in [(id, 1) for id, _ in decodes] + chunks:
            cached[id] += rows
        changes = [id for id in ends if cached[id] == ends[id]]
        ends = {id: end for id, end in ends.items() if cached[id] < end}


def expect(groups: list[Group], step: Step, cached: dict[int, int]) -> None:
    """Run the step on all groups and compare what its rows see with causal attention."""
    want = {
        (id, cached[id] + i): [(id, position) for position in range(cached[id] + i + 1)]
        for id, rows in [(id, 1) for id, _ in step.decodes] + list(step.chunks)
        for i in range(rows)
    }
    seen: dict[Row, list[Row]] = defaultdict(list)
    sent: dict[tuple[int, int], list[Row]] = {}
    received: dict[tuple[int, int], list[Row]] = {}
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
        assert sorted(parts) == list(range(len(rows)))
        for row, keys in parts.items():
            seen[rows[row]] += keys
            holders[rows[row]] |= {number} if keys else set()
        computed[number] = rows
        for swap in batch.exchange:
            sent[number, swap.peer] = [rows[i] for i in swap.sent.tolist()]
            received[swap.peer, number] = [rows[i] for i in swap.received.tolist()]
        assert len(wanted) == batch.last.shape[0]
        answers += [rows[i] for i in batch.last.tolist()]
    assert {row: sorted(keys) for row, keys in seen.items()} == want
    assert sent == received
    for number, rows_ in computed.items():
        for row_ in rows_:
            heard = {peer for peer in computed if row_ in sent.get((peer, number), ())}
            assert holders[row_] <= heard | {number}
    if groups[0].sequences.growth.helix:
        assert all(sorted(rows_) == sorted(want) for rows_ in computed.values())
        assert len(computed) == len(groups) or not want
    assert len(set(answers)) == len(answers), "one group answers for a row"
    assert {id for id, _ in step.decodes} <= {id for id, _ in answers}


def test_rows_that_no_peer_shares_are_not_swapped() -> None:
    growth = Growth(kvp=2, stripe_tokens=10)
    groups = [Group(growth, 0), Group(growth, 1)]
    step = Step(0, [admit(0, 0, 15, 2), admit(1, 1, 4, 2)], [], [(0, 15), (1, 4)])
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
    step = Step(0, [admit(0, 0, 15, 2), admit(1, 1, 4, 2)], [], [(0, 15), (1, 4)])
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
    group = Group(Growth(1, 100), 0)
    batch, wanted, _ = group.run(Step(0, [admit(0, 0, 6, 2, logits)], [], [(0, 6)]))
    assert batch is not None
    assert batch.last.tolist() == rows
    assert [(want.sample, want.send) for want in wanted] == [(True, send)]


def test_the_page_table_is_the_same_tensor_as_long_as_nothing_changes() -> None:
    group = Group(Growth(1, 100), 0)
    group.run(Step(0, [admit(0, 0, 6, 9), admit(1, 0, 3, 9)], [], [(0, 6), (1, 3)]))
    tables = []
    for number in (1, 2):
        batch, _, _ = group.run(Step(number, [], [(0, 1), (1, 1)], []))
        assert batch is not None
        assert batch.decode is not None
        tables.append(batch.decode.pages)
    assert tables[0] is tables[1]
