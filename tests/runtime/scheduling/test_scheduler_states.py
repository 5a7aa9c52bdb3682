"""Scheduler and page book as one state machine: whatever arrives, is cancelled, preempted or shared.

A model of the workers follows every change and every row: it knows what each page holds, by token, and checks
that nobody reads a page that holds anything but his own tokens (whoever wrote them), that no page has two
writers, and that nothing is left when all have gone.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mnemoc.artifact import ChunkRule, Workload
from mnemoc.layout import Layout
from mnemoc.runtime.protocol.messages import Copies, MorePages
from mnemoc.runtime.request import Promise
from mnemoc.runtime.scheduling.cost import Load
from mnemoc.runtime.scheduling.growth import Growth
from mnemoc.runtime.scheduling.job import Admitted, Change, Chunk, Job, MicroBatch
from mnemoc.runtime.scheduling.policies import POLICIES
from mnemoc.runtime.scheduling.prefix import page_hash, page_hashes
from mnemoc.runtime.scheduling.scheduler import Scheduler

from .conftest import PLAN as BASE

PAGE, PAGES, CONTEXT = 4, 40, 120
PLAN = dataclasses.replace(
    BASE,
    chunks=(ChunkRule(0, 40, 24, 1, 0.0), ChunkRule(40, CONTEXT, 10, 1, 0.0)),
    page_size=PAGE,
    num_pages=PAGES,
    stripe_tokens=CONTEXT,
    max_rows=28,
)
LAYOUTS = {
    "one group": (Layout(1, 2, 1), CONTEXT),
    "two groups": (Layout(1, 2, 2), 24),
    "three groups": (Layout(1, 3, 3), 12),
    "helix": (Layout(1, 2, 2, "helix"), 24),
    "stripes that cut pages": (Layout(1, 1, 2), 10),
}


class Rate:
    """A millisecond a row, a microsecond a pair; copies at a price that is given."""

    def __init__(self, copy_s: float) -> None:
        self.copy_s = copy_s

    def pace_s(self, load: Load) -> float:
        return 1e-4 + load.T * 1e-3 + load.QK * 1e-6 + load.KD * 1e-6

    def crossing_s(self, load: Load) -> float:
        return 2 * self.pace_s(load)

    def swap_s(self, pages: int) -> float:
        return self.copy_s * pages


@dataclasses.dataclass
class Asked:
    """A request: all tokens that it will ever have, and how many of them are its prompt's."""

    job: Job
    tokens: list[int]
    prompt: int


class Serving(RuleBasedStateMachine):
    """The engine's side driven by rules, the workers' side played by a model."""

    @initialize(
        layout=st.sampled_from(sorted(LAYOUTS)),
        policy=st.sampled_from(sorted(POLICIES)),
        host_pages=st.sampled_from([0, 5, 30]),
        pages=st.sampled_from([PAGES, 2 * PAGES]),
        tbt_s=st.sampled_from([0.003, 0.08]),
    )
    def begin(self, layout: str, policy: str, host_pages: int, pages: int, tbt_s: float) -> None:
        shape, stripe = LAYOUTS[layout]
        plan = dataclasses.replace(
            PLAN, layout=shape, stripe_tokens=stripe, num_pages=pages, host_pages=host_pages
        )
        workload = Workload(CONTEXT, ttft_s=2.0, tbt_s=tbt_s)
        cost = Rate(1e-5 if host_pages else float("inf"))
        self.scheduler = Scheduler(plan, cost, workload, POLICIES[policy])
        self.plan, self.growth = plan, Growth.of(plan)
        self.now_s, self.ids = 0.0, 0
        self.asked: dict[int, Asked] = {}
        self.flying: list[MicroBatch] = []
        self.tables: dict[int, tuple[Asked, list[list[int]]]] = {}
        self.held: dict[int, int] = {}
        self.pages: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        self.host: dict[tuple[int, int], list[tuple[int, ...]]] = {}

    # ------------------------------------------------------------------------------------- rules

    @rule(
        family=st.integers(0, 2),
        prompt=st.integers(1, 110),
        new=st.integers(1, 40),
        shares=st.booleans(),
        hurry=st.sampled_from([None, 0.01, 10.0]),
        priority=st.integers(-1, 1),
    )
    def arrive(
        self,
        family: int,
        prompt: int,
        new: int,
        shares: bool,
        hurry: float | None,
        priority: int,
    ) -> None:
        """Requests of one family have the same tokens as far as both go."""
        new = min(new, CONTEXT - prompt + 1)
        kv_tokens = prompt + new - 1
        if max(self.scheduler.book.needs(kv_tokens)) > self.plan.num_pages or len(self.asked) > 12:
            return
        tokens = [family * 1000 + position for position in range(prompt)]
        tokens += [family * 1000 + 500 * (self.ids % 2) + position for position in range(new)]
        hashes = page_hashes(tokens[:prompt], PAGE) if shares else None
        promise = Promise(ttft_s=hurry, priority=priority)
        job = self.scheduler.add(self.ids, prompt, kv_tokens, self.now_s, promise, hashes)
        self.asked[self.ids] = Asked(job, tokens, prompt)
        self.ids += 1

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.asked and which < 15:
            id = list(self.asked)[which % len(self.asked)]
            self.scheduler.drop(self.asked.pop(id).job)

    @rule(which=st.integers(0, 30), held=st.integers(0, 3))
    def workers_die(self, which: int, held: int) -> None:
        """They forget everything; who ran goes on where it stopped, some of them later than others."""
        if which > 3:
            return
        ran = {job.id: job.tokens for job in self.scheduler.running.values()}
        self.scheduler.restart()
        self.flying.clear()
        self.tables.clear()
        self.held.clear()
        self.pages.clear()
        self.host.clear()
        assert not self.scheduler.running
        for id, tokens in ran.items():
            job = self.scheduler.waiting[id]
            assert (job.tokens, job.generated) == (tokens, tokens)
            assert job.prompt == self.asked[id].prompt + tokens
        self.scheduler.admission.hold(frozenset(list(ran)[:held]))

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.5]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def room(self) -> set[int]:
        """Groups with fewer micro-batches on their way than there are stages."""
        on_their_way = Counter(group for one in self.flying for group in one.loads)
        return {g for g in range(self.growth.kvp) if on_their_way[g] < self.plan.layout.spp}

    @precondition(lambda self: self.room())
    @rule()
    def dispatch(self) -> None:
        room = self.room()
        micro_batch = self.scheduler.next(self.now_s, room)
        if micro_batch is None:
            held = self.scheduler.admission.held
            idle = self.flying or self.asked.keys() <= held
            assert idle, "requests wait, and nothing is done for them"
            return
        assert micro_batch.loads.keys() <= room
        self.flying.append(micro_batch)
        self.carry_out(micro_batch)
        filled, self.scheduler.filled = self.scheduler.filled, []
        for job in filled:
            assert job.hashes is not None
            tokens = self.asked[job.id].tokens
            while len(job.hashes) < job.cached // PAGE:
                start = len(job.hashes) * PAGE
                before = job.hashes[-1] if job.hashes else b""
                job.hashes.append(page_hash(before, tokens[start : start + PAGE]))
            self.scheduler.book.fill(job.sid, job.hashes, job.cached)

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 10))
    def land(self, which: int) -> None:
        """One after the other on each group; between groups that share nothing in any order."""
        first = [
            one
            for at, one in enumerate(self.flying)
            if all(one.loads.keys().isdisjoint(before.loads) for before in self.flying[:at])
        ]
        micro_batch = first[which % len(first)]
        self.flying.remove(micro_batch)
        going_on = []
        sids = [*micro_batch.decodes, *(chunk.sid for chunk in micro_batch.chunks if chunk.ends)]
        for sid in sids:
            job = self.scheduler.running.get(sid)
            if job is None:
                continue
            if job.first_token_s is None:
                job.begin(self.now_s)
            else:
                job.due_s += job.tbt_s
            job.tokens += 1
            asked = self.asked[job.id]
            if asked.prompt + job.tokens == len(asked.tokens):
                self.scheduler.drop(job)
                del self.asked[job.id]
            else:
                going_on.append(sid)
        self.scheduler.settled(micro_batch, going_on, micro_batch.expected.through_s)

    # ----------------------------------------------------------------------- the workers' model

    def carry_out(self, micro_batch: MicroBatch) -> None:
        for change in micro_batch.changes:
            self.apply(change)
        assert len(micro_batch.decodes) <= self.plan.max_batch
        rows = sum(chunk.rows for chunk in micro_batch.chunks)
        assert len(micro_batch.decodes) + rows <= self.plan.max_rows
        for load in micro_batch.loads.values():
            rows_with_logits = load.R
            assert rows_with_logits <= self.plan.max_batch + 1
        for sid in micro_batch.decodes:
            asked = self.tables[sid][0]
            assert self.held[sid] == asked.prompt + asked.job.tokens - 1, "the newest token is read"
            self.write(sid, 1)
        for chunk in micro_batch.chunks:
            assert self.held[chunk.sid] == chunk.start
            assert self.groups_of(chunk) <= micro_batch.loads.keys()
            self.write(chunk.sid, chunk.rows)
        if not self.growth.helix:
            long = [c for c in micro_batch.chunks if self.tables[c.sid][0].job.long]
            assert len({group for c in long for group in self.groups_of(c)}) == sum(
                len(self.groups_of(c)) for c in long
            ), "at most one long prefill in a batch on a group"

    def apply(self, change: Change) -> None:
        if isinstance(change, Admitted):
            pages = [
                [page for start, count in runs for page in range(start, start + count)]
                for runs in change.pages
            ]
            self.tables[change.sid] = (self.asked_of(change.job), pages)
            self.held[change.sid] = change.cached
            assert change.cached < change.job.prompt
            for position in range(change.cached):
                self.read(change.sid, position)
        elif isinstance(change, MorePages):
            pages = self.tables[change.id][1]
            for start, count in change.pages:
                pages[change.group].extend(range(start, start + count))
        elif isinstance(change, Copies):
            for page, slot in change.pairs:
                assert slot < self.plan.host_pages
                here, there = (change.group, page), (change.group, slot)
                if change.out:
                    self.host[there] = list(self.pages.get(here, []))
                else:
                    self.pages[here] = list(self.host[there])
        else:
            del self.tables[change], self.held[change]

    def groups_of(self, chunk: Chunk) -> set[int]:
        home = self.tables[chunk.sid][0].job.home
        shards = range(self.growth.seen_by(chunk.start + chunk.rows))
        return {self.growth.group(home, shard) for shard in shards}

    def asked_of(self, job: Job) -> Asked:
        return self.asked.get(job.id) or Asked(job, [], 0)

    def place(self, sid: int, position: int) -> tuple[tuple[int, int], int]:
        asked, pages = self.tables[sid]
        shard = self.growth.owner(position)
        group = self.growth.group(asked.job.home, shard)
        local = self.growth.held(shard, position)
        return (group, pages[group][local // PAGE]), local % PAGE

    def write(self, sid: int, rows: int) -> None:
        """The rows' K/V goes to its pages; then they read all before them."""
        asked, _ = self.tables[sid]
        first = self.held[sid]
        for position in range(first, first + rows):
            page, offset = self.place(sid, position)
            stored = self.pages.setdefault(page, [])
            del stored[offset:]
            stored.extend([()] * (offset - len(stored)))
            stored.append(tuple(asked.tokens[: position + 1]))
        self.held[sid] = first + rows
        for position in range(first + rows):
            self.read(sid, position)

    def read(self, sid: int, position: int) -> None:
        """The key of a token stands for it and all before it: so it must be of just these."""
        asked, _ = self.tables[sid]
        page, offset = self.place(sid, position)
        assert self.pages[page][offset] == tuple(asked.tokens[: position + 1])

    # -------------------------------------------------------------------------------- invariants

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.book.audit()

    def teardown(self) -> None:
        """Whatever is left finishes, nobody is starved, and every page can be had again."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.admission.hold(frozenset())
        for _ in range(5000):
            if not self.asked and not self.flying:
                break
            self.now_s += 0.02
            if self.room():
                self.dispatch()
            if self.flying:
                self.land(0)
        assert not self.asked, "a request never finishes"
        while self.scheduler.book.tidy():
            self.scheduler.book.audit()
        self.scheduler.book.audit()
        assert self.scheduler.book.used_fraction == 0
        assert not self.scheduler.running
        assert not self.scheduler.waiting


STEPS = int(os.environ.get("MNEMOC_STATE_STEPS", "5000"))
"""Rules tried in all; a minute is enough for 100,000."""


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that leave are tidied up three pages at a time, so that they are seen half gone; prompts of
    some forty tokens are long, so that two of them could be in a micro-batch."""
    monkeypatch.setattr("mnemoc.runtime.scheduling.pages.TIDIED", 3)
    monkeypatch.setattr("mnemoc.runtime.scheduling.scheduler.LONG_ITERATIONS", 0.5)


def test_whatever_happens_pages_are_right_and_everybody_finishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_steps(monkeypatch)
    run_state_machine_as_test(
        Serving,
        settings=settings(
            max_examples=STEPS // 50,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_who_makes_way_leaves_all_its_pages_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the machine above: while some of them were looked through, nobody ran, and nobody could."""
    small_steps(monkeypatch)
    serving = Serving()
    serving.begin("one group", "lars", host_pages=0, pages=PAGES, tbt_s=0.003)
    serving.arrive(family=0, prompt=94, new=1, shares=False, hurry=0.01, priority=0)
    serving.arrive(family=0, prompt=69, new=1, shares=True, hurry=0.01, priority=0)
    serving.teardown()
    assert serving.scheduler.counts.preemptions, "one made way"
