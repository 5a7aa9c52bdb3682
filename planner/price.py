"""Prices layouts as outlooks (`outlook`): counts, formulas and tables are made once per mesh and links."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from ..artifact import AUTO, FP8, NCCL, NEVER_HALVED, Precision, Workload
from ..ir.build import build
from ..ir.graph import Module
from ..ir.model import ModelSpec
from ..ir.passes import carry, fuse, one_shot, quantize, shard
from ..ir.passes import overlap as overlap_pass
from ..ir.types import DTYPE_NAMES, ITEMSIZE
from ..layout import Layout
from .chunks import (
    Floats,
    Grid,
    Riders,
    Samples,
    Sizes,
    Spread,
    bounded,
    decode_sizes,
    make_grid,
    prefill_sizes,
    sample,
)
from .cluster import Cluster
from .cost import Links, links_of, one_shot_rows, price_terms
from .counting import HALVES, Task, count
from .footprint import Footprint, footprint, kept
from .formulas import StageFormulas, Totals, choosing, stage_formulas, tabulate
from .outlook import Chunks, Outlook, Wiring, balanced, crossing
from .space import Growth
from .workload import total_tokens


def one_layer(spec: ModelSpec, cluster: Cluster, cached: int) -> tuple[float, int]:
    """Seconds of a layer of the unsharded model for one row after `cached` tokens, and its launches."""
    totals, tasks = _unsharded(spec, cluster)
    seconds = totals(decode_sizes(Riders(1, cached, 1)))["layer"]
    return float(seconds), sum(task.launches for task in tasks["layer"])


def whole_layers(spec: ModelSpec, cluster: Cluster, rows: Sequence[float]) -> list[float]:
    """Seconds of a layer of the unsharded model for so many rows of a prompt's beginning."""
    T, nothing = np.array(rows), np.zeros(len(rows))
    sizes = Sizes(T, nothing, T * (T + 1) / 2, T, nothing, nothing)
    return [float(seconds) for seconds in _unsharded(spec, cluster)[0](sizes)["layer"]]


def _unsharded(spec: ModelSpec, cluster: Cluster) -> tuple[Totals, Mapping[str, Sequence[Task]]]:
    module = carry(fuse(shard(build(spec, "float32"), tp=1, kvp=1)))
    tasks = count(module)
    terms = price_terms(tasks, cluster, "float32", module.mesh, Links("intra", "intra"))
    return tabulate(terms), tasks


def process_groups(layout: Layout) -> int:
    """In which a rank communicates: one per axis, and under helix that of all ranks of its stage."""
    return sum(degree > 1 for degree in (layout.tp, layout.spp, layout.kvp)) + layout.helix


WORTH = 0.01
"""By how much halves must make a layer faster: what they cost beside their figures nobody has measured."""


@dataclass(frozen=True)
class Mesh:
    """What a module is sharded for.

    halves: with a layer in halves beside the whole one; one_shot: with sums that may be made in one shot
    """

    tp: int
    kvp: int
    ffn: str
    halves: bool = False
    one_shot: bool = False


@dataclass(frozen=True, eq=False)
class Counted:
    """What a rank does and holds, whatever it costs; degrees: ranks along each axis of the mesh."""

    tasks: Mapping[str, tuple[Task, ...]]
    footprint: Footprint
    degrees: Mapping[str, int]


@lru_cache(maxsize=256)
def counted(spec: ModelSpec, dtype: str, precision: Precision, mesh: Mesh, target: str) -> Counted:
    """Kept beyond a question: neither its workload nor the cluster's figures change what is counted."""
    source = _source(spec, dtype, precision.kv_cache)
    fused = fuse(shard(source, tp=mesh.tp, kvp=mesh.kvp, ffn=mesh.ffn))
    typed = quantize(fused) if precision.weights == FP8 else fused
    carried = carry(overlap_pass(typed) if mesh.halves else typed)
    module = one_shot(carried) if mesh.one_shot else carried
    return Counted(count(module), footprint(module, target), module.mesh)


@lru_cache(maxsize=16)
def _source(spec: ModelSpec, dtype: str, kv_cache: str) -> Module:
    return build(spec, dtype, kv_cache)


class Pricer:
    """Prices layouts of one model, cluster and workload; formulas are made once per mesh and links."""

    def __init__(
        self,
        spec: ModelSpec,
        cluster: Cluster,
        dtype: str,
        workload: Workload,
        precision: Precision = AUTO,
        *,
        eager: bool = False,
        overlap: int | str | None = None,
        all_reduce: str | None = None,
    ) -> None:
        """overlap: rows from which chunks go through layers in halves, NEVER_HALVED, or None: as pays;
        all_reduce: NCCL, or None: for few rows one shot, where that pays.
        """
        self.spec, self.cluster, self.dtype, self.workload = spec, cluster, dtype, workload
        self.precision, self.overlap, self.all_reduce = precision, overlap, all_reduce
        self.grid: Grid = make_grid(workload.context)

        @cache
        def wiring(mesh: Mesh, links: Links) -> Wiring:
            """As if no micro-batch went in halves, though there may be a block of them."""
            of = counted(spec, dtype, precision, mesh, cluster.target)
            terms = price_terms(of.tasks, cluster, dtype, of.degrees, links, eager=eager)
            return Wiring(terms, of.footprint, tabulate(terms))

        @cache
        def halved(wiring: Wiring, rows: int) -> Wiring:
            return dataclasses.replace(
                wiring, totals=choosing(wiring.totals, rows), overlap_rows=rows
            )

        @cache
        def samples(spread: Spread) -> Samples:
            return sample(self.grid, spread)

        @cache
        def chunks(wiring: Wiring, spread: Spread, riders: Riders) -> Chunks:
            cut = samples(dataclasses.replace(spread, groups=None))
            sizes = prefill_sizes(cut.start, cut.size, spread, riders)
            priced = bounded(sizes, cut, spread)
            return Chunks(cut, sizes, priced, wiring.totals(priced))

        @cache
        def decode(wiring: Wiring, riders: Riders) -> Mapping[str, float]:
            blocks = wiring.totals(decode_sizes(riders))
            return {name: float(seconds) for name, seconds in blocks.items()}

        @cache
        def whole(wiring: Wiring, spread: Spread) -> Mapping[str, float]:
            start, size = np.zeros(()), np.array(float(workload.context))
            sizes = prefill_sizes(start, size, spread, Riders(0, 0, 1))
            blocks = wiring.totals(dataclasses.replace(sizes, X=np.zeros(())))
            return {name: float(seconds) for name, seconds in blocks.items()}

        self._wiring, self._chunks, self._decode, self._whole = wiring, chunks, decode, whole
        self._halved = halved

    def wiring(self, layout: Layout) -> Wiring:
        """With a block of halves where chunks of some size go in them: under helix only where they are
        pinned, for its messages are few and its sums need the same link."""
        never = self.overlap == NEVER_HALVED or (self.overlap is None and layout.helix)
        if layout.kvp == 1 or never:
            return self.whole_wiring(layout)
        kvp = layout.kvp if layout.helix else 2  # repeated: all one to a rank
        mesh = self._mesh(layout, kvp, halves=True)
        both = self._wiring(mesh, links_of(layout, self.cluster))
        rows = self.overlap if isinstance(self.overlap, int) else self._rows(both, layout.kvp)
        return self._halved(both, rows) if rows else self.whole_wiring(layout)

    def whole_wiring(self, layout: Layout) -> Wiring:
        """In which no chunk goes in halves."""
        kvp = layout.kvp if layout.helix else min(layout.kvp, 2)
        return self._wiring(self._mesh(layout, kvp), links_of(layout, self.cluster))

    def _mesh(self, layout: Layout, kvp: int, *, halves: bool = False) -> Mesh:
        summed = self.one_shot_rows(layout) > 0
        return Mesh(layout.tp, kvp, layout.ffn, halves, summed)

    def one_shot_rows(self, layout: Layout) -> int:
        """As in `artifact.Plan`. Helix sums over the ranks of all groups, which need not share a node."""
        if self.all_reduce == NCCL or layout.helix:
            return 0
        return one_shot_rows(self.cluster, layout.tp, self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return self.spec.hidden * ITEMSIZE[DTYPE_NAMES[self.dtype]]

    def shared_bytes(self, layout: Layout) -> int:
        """The two buffers that a rank's tp peers read."""
        return 2 * self.one_shot_rows(layout) * self._row_bytes

    def _rows(self, both: Wiring, kvp: int) -> int:
        """The least chunk of the menu that halves make faster by WORTH, and all above it; 0 if none.

        On all groups, at the middle of the context, of which each has its part: where prompts of full length
        spend their time.
        """
        menu = np.array(self.grid.menu, dtype=float)
        keys = np.full_like(menu, self.workload.context / 2 / kvp)
        none = np.zeros_like(menu)
        blocks = both.totals(Sizes(menu, none, menu * keys, keys, none, menu * (kvp - 1)))
        slower = np.flatnonzero(blocks[HALVES] > (1 - WORTH) * blocks["layer"])
        first = int(slower[-1]) + 1 if len(slower) else 0
        return self.grid.menu[first] if first < len(menu) else 0

    @property
    def overlaps(self) -> bool:
        """Whether links carry rows while both their ends compute."""
        return self.cluster.target != "cpu"

    def communication_bytes(self, groups: int) -> int:
        """What the communication library allocates for so many process groups of a rank."""
        return groups * self.cluster.communicator_bytes if groups else 0

    def formulas(self, layout: Layout) -> StageFormulas:
        """The expressions that price a layout, by block and part."""
        wiring = self.wiring(layout)
        return stage_formulas(wiring.terms, wiring.overlap_rows)

    def bounds(self, layouts: Sequence[Layout]) -> tuple[Floats, Floats]:
        """Seconds of TBT and of TTFT below which each layout stays, however its requests grow.

        As if every request lay evenly on all groups from its first token on, and, but for helix, met none
        of its peers: the least rows, keys and swaps that any growth leaves to the busiest group.
        """
        tbt_s, ttft_s = np.empty(len(layouts)), np.empty(len(layouts))
        alike: dict[Wiring, list[int]] = defaultdict(list)
        for i, layout in enumerate(layouts):
            alike[self.whole_wiring(layout)].append(i)
        tokens, requests = total_tokens(self.workload), self.workload.concurrency
        context, layers = float(self.workload.context), self.spec.num_layers
        for wiring, group in alike.items():
            k = np.array([layouts[i].kvp for i in group], dtype=float)
            p = np.array([layouts[i].spp for i in group])
            swaps = np.array([layouts[i].kvp - 1.0 if layouts[i].helix else 0.0 for i in group])
            none, some = np.zeros_like(k), np.ceil(requests / k)
            rows = np.where(swaps > 0, requests, some)
            decode = Sizes(rows, some, none, none, requests * tokens / k, rows * swaps)
            pairs = context * (context + 1) / 2 / k
            prefill = Sizes(none + context, none, pairs, context / k, none, none)
            tbt_s[group] = crossing(wiring.totals(decode), p, layers)
            ttft_s[group] = balanced(wiring.totals(prefill), 0.0, p, layers)
        return tbt_s, ttft_s

    def outlook(self, layout: Layout, growth: Growth, *, whole: bool = False) -> Outlook:
        """whole: as if no chunk went in halves"""
        wiring = self.whole_wiring(layout) if whole else self.wiring(layout)
        riders = growth.riders(self.workload.concurrency - 1)
        alone = self._decode(wiring, growth.riders(self.workload.concurrency))
        layers = self.spec.num_layers
        return Outlook(
            layout=layout,
            growth=growth,
            num_layers=layers,
            decode_s=float(crossing(alone, layout.spp, layers)),
            head_s=0.0 if riders.count else self._decode(wiring, Riders(1, 1, 1))["head"],
            rides=riders.count > 0,
            overlaps=self.overlaps and layout.spp > 1 and riders.count == 0,
            kept=kept(
                self.workload.context,
                growth,
                self.communication_bytes(process_groups(layout)) + self.shared_bytes(layout),
            ),
            footprint=wiring.footprint,
            overlap_rows=wiring.overlap_rows,
            whole=lambda: self._whole(wiring, growth.spread),
            price=lambda: self._chunks(wiring, growth.spread, riders),
        )
