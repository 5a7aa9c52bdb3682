"""The schedule of prompts, run ahead as a fluid: when each will have its first token.

Time goes on in turns, the first as long as an iteration and each a quarter longer than the last: some fifty
reach from an iteration to an hour. In a turn each KVP group has the turn's seconds, and prompts take theirs
in the policy's order as they do in a micro-batch (`packing`): one long prompt on a group, which leaves room
for short ones behind it; a prompt of several groups waits for the busiest.

    seconds of a prompt = its predicted time alone × slowed

slowed: what a row takes beside the decodes over what it takes alone, each in chunks as `packing` cuts them;
    of p micro-batches in flight, one carries the decodes

Whoever waits for pages gets them in the policy's order, as requests end: one that decodes at its last token,
an iteration each. It is not known here who stops before `max_tokens`, or whose pages go to one more urgent.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .admission import in_order
from .cost import Load
from .job import Job
from .packing import LEAST_ROWS, Adaptive, add_decodes, chunk_loads
from .pipeline import pace_s
from .scheduler import Scheduler

MOST_PROMPTS = 32
"""Prompts that are run ahead one by one; those behind them in order are taken to come one after the other."""
MOST_TURNS = 96
GROWTH = 1.25
"""Of a turn over the one before."""
LEAST_RATE = 1e-6
"""Of a group's time: what is left beside others that hold all of it, but for rounding."""
MOST_COMING = 0.9
"""Of a group's time, what short prompts to come are taken to use."""


@dataclass(eq=False, slots=True)
class _Prompt:
    """A prompt as it runs ahead. job: a copy, whose left_s goes down.

    share: of an iteration, that its chunks take, where others would fill the rest
    step_s, tail_s: of a micro-batch with its next chunk, until the next one may follow, and from then until
        it has left the last stage
    needs: pages by group, None: it has them
    """

    job: Job
    groups: tuple[int, ...]
    slowed: float
    share: float
    step_s: float
    tail_s: float
    needs: Mapping[int, int] | None = None


@dataclass(eq=False)
class _Turn:
    """Some seconds of each group. done_s: of prompts that end in it, one after the other; held_s: of others,
    all the while, by request in given_s; longs: groups with a long prompt."""

    at_s: float
    seconds: float
    done_s: list[float]
    held_s: list[float]
    longs: set[int] = field(default_factory=set)
    given_s: dict[int, float] = field(default_factory=dict)

    def left(self, group: int) -> float:
        return max(0.0, self.seconds - self.done_s[group] - self.held_s[group])

    def hold(self, seconds: Iterable[float]) -> None:
        self.held_s = [held_s + more_s for held_s, more_s in zip(self.held_s, seconds, strict=True)]


class Fluid:
    """One look ahead. token_s: from one token of a decode to its next."""

    def __init__(
        self,
        scheduler: Scheduler,
        packing: Adaptive,
        come_per_s: float,
        now_s: float,
        backlog_s: Mapping[int, float],
    ) -> None:
        """come_per_s: predicted work of short prompts that will come, per second
        backlog_s: by group, until what is on its way there has left
        """
        self._scheduler, self._packing, self._cost = scheduler, packing, packing.cost
        self._come_per_s, self._now_s, self._backlog_s = come_per_s, now_s, backlog_s
        self._groups = range(scheduler.growth.kvp)
        self._decodes: dict[int, Load] = {}
        self._decoding = [job for job in scheduler.running.values() if job.issued == job.prompt]
        add_decodes(scheduler.growth, self._decoding, self._decodes)
        promises = [job.tbt_s for job in self._decoding]
        self._allowed_s = min(promises, default=scheduler.workload.tbt_s) / scheduler.overrun.ratio
        self._known: dict[tuple[int, ...], tuple[float, float, float, float]] = {}
        self._found: dict[int, float] = {}
        policy, waiting = scheduler.policy, scheduler.waiting
        everyone = {job.id: job for job in scheduler.running.values() if job.issued < job.prompt}
        order = in_order(policy, everyone | dict(waiting), now_s)
        self._free = [scheduler.book.available(group) for group in self._groups]
        self._prompts = [self._prompt(job) for job in order[:MOST_PROMPTS]]
        self._behind = order[MOST_PROMPTS:]
        alone_s = self._crossing_s(self._decodes)
        self.token_s = max([alone_s, *(one.step_s + one.tail_s for one in self._prompts)])
        self._ends: list[tuple[float, int, Job, int]] = []  # a heap: when, whose, tokens held
        if any(prompt.needs for prompt in self._prompts):
            for job in self._decoding:
                self._will_end(job, (job.kv_tokens - job.cached) * self.token_s)

    def to_end(self, until: Job | None) -> dict[int, float]:
        """The schedule, turn by turn."""
        found, at_s = self._found, 0.0
        turn_s = max((prompt.step_s for prompt in self._prompts), default=0.0)
        for _ in range(MOST_TURNS):
            if until is not None and until.id in found:
                return found
            if not self._prompts:
                break
            self._admit(at_s)
            if not any(prompt.needs is None for prompt in self._prompts):
                if not self._ends:
                    break
                at_s = self._ends[0][0]
                continue
            self._turn(at_s, turn_s)
            at_s += turn_s
            turn_s *= GROWTH
        self._one_after_the_other(at_s)
        return found

    # ---------------------------------------------------------------------------------- one turn

    def _turn(self, at_s: float, turn_s: float) -> None:
        """Prompts take their seconds of it, in order, as in a micro-batch; what is left goes to who wants
        more."""
        scheduler, policy = self._scheduler, self._scheduler.policy
        ready = {prompt.job.id: prompt for prompt in self._prompts if prompt.needs is None}
        jobs = {id: prompt.job for id, prompt in ready.items()}
        order = [ready[job.id] for job in in_order(policy, jobs, self._now_s + at_s)]
        turn = _Turn(at_s, turn_s, [0.0] * len(self._groups), [0.0] * len(self._groups))
        longs = [prompt for prompt in order if prompt.job.long]
        for prompt in longs:
            if turn.longs.isdisjoint(prompt.groups):
                turn.longs.update(prompt.groups)
            else:
                order.remove(prompt)
        at = order.index(longs[0]) if longs and policy.room else len(order)
        for prompt in order[:at]:
            self._serve(prompt, turn, prompt.share)
        if at < len(order):
            slack = longs[0].job.relative_slack(self._now_s + at_s)
            room = min(policy.room, max(policy.least_room, slack))
            kept = [(1 - room) * turn.left(group) for group in self._groups]
            turn.hold(kept)
            for prompt in order[at:]:
                if not prompt.job.long:
                    self._serve(prompt, turn, 1.0)
            turn.hold([-seconds for seconds in kept])
            per_s = self._come_per_s / scheduler.growth.kvp
            come_s = min(MOST_COMING, room, per_s) * turn_s
            turn.hold([min(come_s, turn.left(group)) for group in self._groups])
        for prompt in order:
            if prompt.job.id not in self._found:
                self._serve(prompt, turn, 1.0)

    def _serve(self, prompt: _Prompt, turn: _Turn, share: float) -> None:
        """As many of the turn's seconds as are left on all its groups, but for this share at most, and as it
        needs."""
        job, before_s = prompt.job, turn.given_s.get(prompt.job.id, 0.0)
        for group in prompt.groups:  # its share of the first time, to be had again
            turn.held_s[group] -= before_s
        job.left_s += before_s / prompt.slowed
        has_s = min(share * turn.seconds, *map(turn.left, prompt.groups))
        needs_s = job.left_s * prompt.slowed
        if needs_s > has_s:
            turn.given_s[job.id] = has_s
            job.left_s -= has_s / prompt.slowed
            for group in prompt.groups:
                turn.held_s[group] += has_s
            return
        within_s = 0.0
        for group in prompt.groups:
            turn.done_s[group] += needs_s
            rate = max(LEAST_RATE, 1 - turn.held_s[group] / turn.seconds)
            within_s = max(within_s, turn.done_s[group] / rate)
        self._first_token(prompt, turn.at_s + min(turn.seconds, within_s))

    def _first_token(self, prompt: _Prompt, at_s: float) -> None:
        """The prompt's work is done so many seconds after what is on its way. Its last iteration may carry
        others too."""
        self._prompts.remove(prompt)
        job = prompt.job
        others = [other for other in self._prompts if other.needs is None]
        if any(not set(prompt.groups).isdisjoint(other.groups) for other in others):
            step_s = max(prompt.step_s, *(other.step_s for other in others))
            at_s = math.ceil(at_s / step_s - 1e-9) * step_s
        self._note(job, prompt.groups, at_s, prompt.tail_s)
        if self._ends:
            self._will_end(job, at_s + (job.kv_tokens - job.prompt) * self.token_s)

    # ------------------------------------------------------------------------------------- pages

    def _admit(self, at_s: float) -> None:
        """Whoever waits and has room by now."""
        while self._ends and self._ends[0][0] <= at_s:
            _, _, job, tokens = heapq.heappop(self._ends)
            for group, count in self._pages(job, tokens).items():
                self._free[group] += count
        waiting = {p.job.id: p for p in self._prompts if p.needs is not None}
        jobs = {id: prompt.job for id, prompt in waiting.items()}
        for job in in_order(self._scheduler.policy, jobs, self._now_s + at_s):
            prompt = waiting[job.id]
            assert prompt.needs is not None
            if all(self._free[group] >= count for group, count in prompt.needs.items()):
                for group, count in prompt.needs.items():
                    self._free[group] -= count
                prompt.needs = None
            elif job.slack_s(self._now_s + at_s) <= 0:
                break  # nobody overtakes who is late

    def _will_end(self, job: Job, end_s: float) -> None:
        heapq.heappush(self._ends, (end_s, job.id, job, max(job.covered, job.prompt)))

    def _pages(self, job: Job, tokens: int) -> dict[int, int]:
        growth, needs = self._scheduler.growth, self._scheduler.book.needs(tokens)
        return {growth.group(job.home, shard): count for shard, count in enumerate(needs)}

    # ----------------------------------------------------------------------------- what it stands on

    def _prompt(self, job: Job) -> _Prompt:
        """As it stands. One that waits is taken to come where the engine would have it now."""
        job, needs = copy.copy(job), None
        scheduler = self._scheduler
        if job.sid < 0:
            job.home, found = scheduler.admission.home(job, scheduler.prefilling)
            job.issued = found * scheduler.plan.page_size
            if found:
                job.left_s = scheduler.prefill_time.left_s(job.whole_s, job.issued)
            needs = self._pages(job, scheduler.admission.tokens(job))
        seen = scheduler.growth.seen_by(job.prompt)
        groups = tuple(scheduler.growth.group(job.home, shard) for shard in range(seen))
        return _Prompt(job, groups, *self._beside_decodes(job), needs)

    def _beside_decodes(self, job: Job) -> tuple[float, float, float, float]:
        """`slowed`, `share`, `step_s` and `tail_s`: of chunks in the middle of what is left of it."""
        plan, left = self._scheduler.plan, job.prompt - job.issued
        most = min(plan.chunk_at(job.issued), left)
        key = (job.home, job.issued.bit_length(), left.bit_length(), most.bit_length())
        if key in self._known:
            return self._known[key]
        ahead = copy.copy(job)
        if left > most:
            ahead.issued += left // 2
            most = min(plan.chunk_at(ahead.issued), job.prompt - ahead.issued)
        ends = ahead.issued + most == ahead.prompt
        growth, decodes = self._scheduler.growth, self._decodes
        loads = chunk_loads(growth, ahead, most, ends)
        step_s, crossing_s = pace_s(self._cost, loads), self._crossing_s(loads)
        slowed, share = 1.0, min(1.0, crossing_s / self._allowed_s)
        if not decodes.keys().isdisjoint(loads):
            rows, added = self._rows_beside(ahead)
            both = {group: decodes.get(group, Load()) + load for group, load in added.items()}
            alone_s, step_s = step_s, pace_s(self._cost, both)
            crossing_s = self._crossing_s(both)
            empty = plan.layout.spp - 1  # micro-batches without decodes beside each with them
            rate = (rows + empty * most) / (step_s + empty * alone_s)
            slowed = max(1.0, most / alone_s / rate)
            share = (1 + empty * share) / (1 + empty)
        self._known[key] = slowed, share, step_s, max(0.0, crossing_s - step_s)
        return self._known[key]

    def _rows_beside(self, job: Job) -> tuple[int, dict[int, Load]]:
        """A chunk of it beside all decodes."""
        plan, packing, left = self._scheduler.plan, self._packing, job.prompt - job.issued
        most = min(left, max(LEAST_ROWS, plan.max_rows - len(self._decoding)))
        rows, added = packing.fitting(job, most, self._decodes, self._allowed_s)
        if not rows:
            rows = min(LEAST_ROWS, most)
            added = chunk_loads(self._scheduler.growth, job, rows, rows == left)
        return rows, added

    def _one_after_the_other(self, at_s: float) -> None:
        """Who is left, in order, as if each had its groups to itself."""
        scheduler, done_s = self._scheduler, [at_s] * len(self._groups)
        rest = [prompt.job for prompt in self._prompts] + self._behind
        for job in rest:
            seen = range(scheduler.growth.seen_by(job.prompt))
            groups: Iterable[int] = [scheduler.growth.group(job.home, shard) for shard in seen]
            slowed, _, _, tail_s = self._beside_decodes(job)
            end_s = max(done_s[group] for group in groups) + job.left_s * slowed
            for group in groups:
                done_s[group] = end_s
            self._note(job, groups, end_s, tail_s)

    def _note(self, job: Job, groups: Iterable[int], at_s: float, tail_s: float) -> None:
        """Its work is done so many seconds after what is on its way, and then has `tail_s` to go, or until
        that has left."""
        backlog_s = max(self._backlog_s.get(group, 0.0) for group in groups)
        self._found[job.id] = max(backlog_s, tail_s) + at_s

    def _crossing_s(self, loads: Mapping[int, Load]) -> float:
        return max(map(self._cost.crossing_s, loads.values()), default=0.0)
