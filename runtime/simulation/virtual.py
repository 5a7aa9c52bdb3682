"""Time without machines: each stage of each KVP group is a station, and cost.py says how long it takes.

A micro-batch passes the stages one after the other; a station takes micro-batches in the order in which they
were sent, each when it is there and the station is free:

    begin = max(arrives, free)        end = begin + seconds        the next stage's arrives = end

Groups that share a request (its rows are computed on all of them, its partial results swapped in each layer)
begin together and take as long as the slowest of them; under helix that is all groups. Others go their own
ways. On a GPU a link carries rows while both its ends compute, so it is a station of its own, and the hop is
not in the stage's seconds (as the planner counts it, `planner/outlook.py`). Pages copied to or from host
memory hold up their group in each stage before its rows.

Nothing here knows of tokens: whatever asks for one gets 0.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from ...artifact import Plan
from ..protocol.messages import Copies, Done
from ..request import Handle
from ..scheduling.cost import Load
from ..scheduling.growth import Growth
from ..scheduling.job import Admitted, Job, MicroBatch


@dataclass
class Clock:
    """Seconds since the traffic began. Moved on by whoever runs the simulation."""

    now_s: float = 0.0


class Watch(Protocol):
    """Is told when a station works. stage: for a link, of the stage before it."""

    def station(
        self, number: int, stage: int, group: int, begin_s: float, end_s: float, *, link: bool
    ) -> None: ...


class Times:
    """Seconds of a micro-batch's way, of one group's load: each stage without hop, and the hop."""

    def __init__(self, cost: ModuleType, plan: Plan) -> None:
        self._cost = cost
        self._stages = cost.STAGES
        self.overlaps = plan.target != "cpu" and plan.layout.spp > 1

    def of(self, load: Load) -> tuple[list[float], float]:
        """([seconds of each stage], seconds on each link). The hop is 0 where it is in the stages."""
        every, embed, layer, head, hop = self._cost.blocks_s(
            load.T, load.R, load.QK, load.KV, load.KD, load.X
        )
        inside, link = (0.0, hop) if self.overlaps else (hop, 0.0)
        stages = [
            every + layers * layer + embeds * embed + heads * head + sends * inside
            for layers, embeds, heads, sends in self._stages
        ]
        return stages, link

    def swap_s(self, pages: int) -> float:
        """Seconds that a stage's ranks take to copy so many pages."""
        return float(self._cost.swap_s(pages))


class Stations:
    """Carries out micro-batches on a clock: `send` says when each group is done, `pop` hands that out.

    busy_s, links_s: [stage][group], seconds that each has worked so far.
    """

    def __init__(
        self, plan: Plan, cost: ModuleType, clock: Clock, watch: Watch | None = None
    ) -> None:
        stages, groups = plan.layout.spp, plan.layout.kvp
        self.busy_s = [[0.0] * groups for _ in range(stages)]
        self.links_s = [[0.0] * groups for _ in range(stages - 1)]
        self._free_s = [[0.0] * groups for _ in range(stages)]
        self._link_free_s = [[0.0] * groups for _ in range(stages - 1)]
        self._times = Times(cost, plan)
        self._growth = Growth.of(plan)
        self._clock = clock
        self._watch = watch
        self._jobs: dict[int, Job] = {}
        self._wide: set[int] = set()  # of them, those that will have more than one shard
        self._done: list[tuple[float, int, int, Done]] = []

    @property
    def overlaps(self) -> bool:
        """Whether links are stations of their own."""
        return self._times.overlaps

    @property
    def next_s(self) -> float | None:
        """When the next micro-batch's group is done; None if nothing is on its way."""
        return self._done[0][0] if self._done else None

    def pop(self) -> Done:
        return heapq.heappop(self._done)[3]

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        """A micro-batch sets out now."""
        copied_s = self._change(micro_batch) if micro_batch.changes else {}
        loads = micro_batch.loads
        tokens = self._tokens(micro_batch)
        for groups in self._together(micro_batch):
            self._pass(number, groups, loads, copied_s, tokens)
        for group in copied_s.keys() - loads.keys():
            self._hold_up(group, copied_s[group])

    def _change(self, micro_batch: MicroBatch) -> dict[int, float]:
        """Who comes and who goes; seconds that each group spends on copying pages."""
        copied_s: dict[int, float] = {}
        for change in micro_batch.changes:
            if isinstance(change, Admitted):
                self._jobs[change.sid] = change.job
                if self._growth.shards(change.job.kv_tokens) > 1:
                    self._wide.add(change.sid)
            elif isinstance(change, int):
                self._jobs.pop(change, None)
                self._wide.discard(change)
            elif isinstance(change, Copies):
                seconds = self._times.swap_s(len(change.pairs))
                copied_s[change.group] = copied_s.get(change.group, 0.0) + seconds
        return copied_s

    def _pass(
        self,
        number: int,
        groups: tuple[int, ...],
        loads: Mapping[int, Load],
        copied_s: Mapping[int, float],
        tokens: Mapping[int, list[tuple[int, int]]],
    ) -> None:
        """Groups that advance together go through all stages."""
        stages_s, hop_s = self._times.of(loads[groups[0]])
        hops_s = [hop_s]
        for group in groups[1:]:
            more_s, hop_s = self._times.of(loads[group])
            stages_s = list(map(max, stages_s, more_s))
            hops_s.append(hop_s)
        extra_s = max(copied_s.get(group, 0.0) for group in groups) if copied_s else 0.0
        at_s, last, seconds = self._clock.now_s, len(stages_s) - 1, 0.0
        for stage, free_s in enumerate(self._free_s):
            begin_s = at_s
            for group in groups:
                begin_s = max(begin_s, free_s[group])
            seconds = stages_s[stage] + extra_s
            at_s = begin_s + seconds
            busy_s = self.busy_s[stage]
            for group in groups:
                free_s[group] = at_s
                busy_s[group] += seconds
                if self._watch is not None:
                    self._watch.station(number, stage, group, begin_s, at_s, link=False)
            if stage < last and self._times.overlaps:
                at_s = self._cross(number, stage, groups, at_s, hops_s)
        for group in groups:
            done = Done(number, group, tokens.get(group, ()), (), seconds)
            heapq.heappush(self._done, (at_s, number, group, done))

    def _cross(
        self, number: int, stage: int, groups: tuple[int, ...], at_s: float, hops_s: list[float]
    ) -> float:
        """Over the links behind a stage, each group on its own; when all have arrived."""
        free_s, worked_s, arrived_s = self._link_free_s[stage], self.links_s[stage], at_s
        for group, hop_s in zip(groups, hops_s, strict=True):
            begin_s = max(at_s, free_s[group])
            free_s[group] = begin_s + hop_s
            worked_s[group] += hop_s
            arrived_s = max(arrived_s, free_s[group])
            if self._watch is not None:
                self._watch.station(number, stage, group, begin_s, free_s[group], link=True)
        return arrived_s

    def _hold_up(self, group: int, seconds: float) -> None:
        """A group copies pages beside a micro-batch in which it has no rows."""
        for free_s in self._free_s:
            free_s[group] = max(free_s[group], self._clock.now_s) + seconds

    def _tokens(self, micro_batch: MicroBatch) -> dict[int, list[tuple[int, int]]]:
        """Whom each group hands a token: the request whose last position it stores."""
        growth = self._growth
        ends = [chunk for chunk in micro_batch.chunks if chunk.ends]
        if growth.kvp == 1:
            sids = [*micro_batch.decodes, *(chunk.sid for chunk in ends)]
            return {0: [(sid, 0) for sid in sids]}
        tokens: dict[int, list[tuple[int, int]]] = {}
        for sid in micro_batch.decodes:
            job = self._jobs[sid]  # its own row is counted in `cached` already
            group = growth.group(job.home, growth.owner(job.cached - 1))
            tokens.setdefault(group, []).append((sid, 0))
        for chunk in ends:
            last = chunk.start + chunk.rows - 1
            group = growth.group(self._jobs[chunk.sid].home, growth.owner(last))
            tokens.setdefault(group, []).append((chunk.sid, 0))
        return tokens

    def _together(self, micro_batch: MicroBatch) -> Iterable[tuple[int, ...]]:
        """The groups, by who waits for whom."""
        loads = micro_batch.loads
        if len(loads) == 1 or self._growth.helix:
            return [tuple(loads)]
        parts = [{group} for group in loads]
        if any(load.X for load in loads.values()):
            for groups in self._spans(micro_batch):
                joined = set(groups).union(*(part for part in parts if part & groups))
                parts = [joined, *(part for part in parts if not part & groups)]
        return [tuple(sorted(part)) for part in parts]

    def _spans(self, micro_batch: MicroBatch) -> Iterable[set[int]]:
        """The groups of each request that lies on several."""
        decoding = set(micro_batch.decodes)
        ends = {chunk.sid: chunk.start + chunk.rows for chunk in micro_batch.chunks}
        for sid in self._wide:
            tokens = self._jobs[sid].cached if sid in decoding else ends.get(sid, 0)
            if tokens > self._growth.stripe_tokens:
                home, shards = self._jobs[sid].home, self._growth.shards(tokens)
                yield {self._growth.group(home, shard) for shard in range(shards)}
