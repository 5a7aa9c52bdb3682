"""Which KVP groups go in step: those that requests tie together. Each such island has its own micro-batches.

A request's rows are computed on all groups that hold a shard of it, which swap partial results in every
layer, so they begin together. Groups that no request ties need not wait for each other: one may be in the
midst of a long prompt's chunk while another's decodes cross several times.

Only who may have rows in the next micro-batch ties: a decode that has its token, and a prompt, of long ones
the first in order on its groups. One of an island's groups may have to wait until the others have room, and
takes nothing else meanwhile: so all of them have room in the end, and a request on several groups is not put
off for ever by those that need only one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ...artifact import Plan
from .growth import Growth
from .job import Job

Island = frozenset[int]


class Islands:
    """Knows who is on several groups, or will be. apart: whether there is ever more than one island."""

    def __init__(self, plan: Plan, growth: Growth, apart: bool) -> None:
        self._plan = plan
        self._growth = growth
        self._apart = apart and growth.kvp > 1 and not growth.helix
        self._all: Island = frozenset(range(growth.kvp))
        self._wide: dict[int, Job] = {}

    def admit(self, job: Job) -> None:
        if self._apart and self._growth.shards(job.kv_tokens) > 1:
            self._wide[job.sid] = job

    def leave(self, sid: int) -> None:
        self._wide.pop(sid, None)

    def now(self, prompts: Iterable[Job], ready: Mapping[int, Job]) -> Sequence[Island]:
        """All groups, by who goes with whom. prompts: in order; ready: decodes that have their token."""
        if not self._apart:
            return (self._all,)
        return joined(self._growth, self._spans(prompts, ready) if self._wide else ())

    def on(self, island: Island, jobs: Collection[Job]) -> list[Job]:
        """Those of the jobs that live wholly on the island."""
        if len(island) == len(self._all):
            return list(jobs)
        groups, wide = self._growth.groups, self._wide
        return [
            job
            for job in jobs
            if job.home in island
            and (job.sid not in wide or groups(job.home, job.cached + 1) <= island)
        ]

    def _spans(self, prompts: Iterable[Job], ready: Mapping[int, Job]) -> Iterator[Island]:
        """The groups of each request that ties some."""
        growth, taken = self._growth, set[int]()
        for job in prompts:
            if job.long or job.sid in self._wide:
                reach = min(job.prompt, job.issued + self._plan.chunk_at(job.issued))
                groups = growth.groups(job.home, reach)
                if job.long and not taken.isdisjoint(groups):
                    continue  # one long prompt at most is in a micro-batch on a group
                if job.long:
                    taken |= groups
                yield groups
        for sid, job in self._wide.items():
            if sid in ready:
                yield growth.groups(job.home, job.cached + 1)


def joined(growth: Growth, spans: Iterable[Island]) -> list[Island]:
    """The groups, those of one span together."""
    found = [frozenset({group}) for group in range(growth.kvp)]
    for groups in spans:
        if len(groups) > 1 and len(found) > 1:
            whole = groups.union(*(island for island in found if not island.isdisjoint(groups)))
            found = [whole, *(island for island in found if island.isdisjoint(groups))]
    return found
