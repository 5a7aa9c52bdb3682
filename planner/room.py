"""Room beyond the promise: what a chosen plan makes of memory that is left. The choice knows nothing of it.

A promise names a few requests of full length; a server has more of them, and shorter ones. So, once layout,
split and chunks are chosen:

**Decodes.** As many sequences may decode together, B, as memory has room for. A step then has `max_rows`
rows, the largest chunk and B decodes, and is counted at its worst: all on one group, all swapped with each
other group that a request comes to, B + 1 of them with logits, beside the keys of a whole prompt. So any
micro-batch of no more rows, and no more of them with logits, needs no more, whatever is in it. But rows of
sequences whose keys find no pages would serve nobody: B sequences have LEAST_TOKENS tokens each.

**KV pages.** All that remains then.

Where the promised sequences alone leave no room for a step at its worst, there are no others, and the steps
that were counted are the plan's own chunks with the promised decodes.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from ..artifact import Plan
from ..speeds import Swap
from .chunks import Sizes
from .cluster import Cluster
from .footprint import Footprint, kept_per_page
from .outlook import Outlook
from .search import Finding

MOST_DECODES = 1024
"""Beyond it a step gains next to nothing: an H100 computes as long as it reads weights from 300 rows on (in
fp8, 600), and what the host does for each row is not free.
"""

LEAST_TOKENS = 512
"""Of a chat's prompt and answer; the median answer of ShareGPT alone has 415."""

CPU_SHARE = 0.5
"""Of a machine's memory, what a plan for its cores fills beyond the promise: all else needs some too."""


@dataclass(frozen=True)
class Room:
    """max_batch, max_rows: as in `artifact.Plan`.

    pages: KV pages beyond the promise; step_bytes: what `max_rows` rows need beyond the promise's step, and
    the ids and page tables of further requests
    """

    max_batch: int
    max_rows: int
    pages: int
    step_bytes: int


NONE = Room(0, 0, 0, 0)


def room(finding: Finding, cluster: Cluster) -> Room:
    """What is left on the rank of each stage when it holds what the promise needs, shared out as above."""
    left = _Left.of(finding, cluster)
    growth = left.outlook.growth
    decodes, step_bytes = growth.concurrency, left.promised_bytes
    if left.pages(left.worst_bytes(decodes)) >= 0:
        more = range(decodes + 1, MOST_DECODES + 1)
        decodes += bisect_left(more, True, key=lambda count: not left.serves(count))
        step_bytes = left.worst_bytes(decodes)
    pages = max(0, left.pages(step_bytes))
    beyond = step_bytes - left.promised_bytes + pages * kept_per_page(growth)
    return Room(decodes, left.largest + decodes, pages, beyond)


@dataclass(frozen=True)
class _Left:
    """What there is to share out.

    largest: rows of the largest chunk; longest: the most keys that a chunk sees on its group
    promised_bytes: of the promise's step; stages: bytes for a step and for pages, and layers, of each
    """

    outlook: Outlook
    largest: int
    longest: float
    promised_bytes: int
    stages: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, finding: Finding, cluster: Cluster) -> _Left:
        outlook, split = finding.outlook, finding.candidate.split
        rows = np.arange(len(finding.choice))
        used = outlook.chunks.samples.weight[:, rows, finding.choice] > 0
        chosen, keys = (
            values[:, rows, finding.choice][used]
            for values in (outlook.chunks.samples.size, outlook.chunks.sizes.KV)
        )
        share = CPU_SHARE if cluster.target == "cpu" else 1.0
        limit = int(share * cluster["memory.capacity"] - cluster["memory.reserve"])
        return cls(
            outlook,
            int(chosen.max()),
            float(keys.max()),
            int(outlook.step_bytes[rows, finding.choice].max()),
            tuple(
                (limit - held, layers)
                for held, layers in zip(outlook.stage_bytes(split), split, strict=True)
            ),
        )

    def worst_bytes(self, decodes: int) -> int:
        """A step of the largest chunk and so many decodes, at its worst."""
        outlook, rows = self.outlook, self.largest + decodes
        peers = outlook.growth.riders(1).groups - 1
        numbers = (rows, decodes + 1, 0, self.longest, 0, rows * peers)
        sizes = Sizes(*(np.array(float(number)) for number in numbers))
        return int(outlook.footprint.step_bytes(sizes, outlook.layout.spp, outlook.kept))

    def pages(self, step_bytes: int) -> int:
        """Pages beyond the promise, beside a step of so many bytes; negative if that does not fit."""
        growth = self.outlook.growth
        layer = growth.page_size * self.outlook.footprint.kv_per_token
        kept = kept_per_page(growth)
        return min((left - step_bytes) // (layers * layer + kept) for left, layers in self.stages)

    def serves(self, decodes: int) -> bool:
        """Whether so many sequences find pages beside the step that they need."""
        growth = self.outlook.growth
        more = self.pages(self.worst_bytes(decodes))
        tokens = growth.kvp * (growth.pages + more) * growth.page_size
        return more >= 0 and decodes * min(LEAST_TOKENS, growth.total) <= tokens


def page_bytes(held: Footprint, page_size: int, layers: int) -> int:
    """Of a KV page, over so many layers."""
    return layers * page_size * held.kv_per_token


def host_pages(finding: Finding, cluster: Cluster) -> int:
    """As in `artifact.Plan`: for the rank with the most layers."""
    outlook, layers = finding.outlook, max(finding.candidate.split)
    return cluster.host_bytes // page_bytes(outlook.footprint, outlook.growth.page_size, layers)


def swap_of(plan: Plan, cluster: Cluster, held: Footprint) -> Swap | None:
    """How pages of the rank with the most layers go to host memory; None where none do."""
    if not plan.host_pages:
        return None
    layers = max(stage.num_layers for stage in plan.stages)
    page_s = page_bytes(held, plan.page_size, layers) / cluster["host.bandwidth"]
    return Swap(layers * cluster["host.latency"], page_s)
