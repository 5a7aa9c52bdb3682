"""Prices layouts as outlooks (`outlook`): counts, formulas and tables are made once per mesh and links."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from ..artifact import AUTO, FP8, Layout, Precision, Workload
from ..ir.build import build
from ..ir.graph import Module
from ..ir.model import ModelSpec
from ..ir.passes import fuse, quantize, shard
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
from .cost import (
    Links,
    StageFormulas,
    Task,
    count,
    links_of,
    price_terms,
    stage_formulas,
    tabulate,
)
from .footprint import Footprint, footprint, kept
from .outlook import Chunks, Outlook, Wiring, balanced, crossing
from .space import Growth
from .workload import total_tokens


def one_layer(spec: ModelSpec, cluster: Cluster, cached: int) -> tuple[float, int]:
    """Seconds of a layer of the unsharded model for one row after `cached` tokens, and its launches."""
    module = fuse(shard(build(spec, "float32"), tp=1, kvp=1))
    tasks = count(module)
    terms = price_terms(tasks, cluster, "float32", module.mesh, Links("intra", "intra"))
    seconds = tabulate(terms)(decode_sizes(Riders(1, cached, 1)))["layer"]
    return float(seconds), sum(task.launches for task in tasks["layer"])


def process_groups(layout: Layout) -> int:
    """In which a rank communicates: one per axis, and under helix that of all ranks of its stage."""
    return sum(degree > 1 for degree in (layout.tp, layout.spp, layout.kvp)) + layout.helix


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
    ) -> None:
        self.spec, self.cluster, self.dtype, self.workload = spec, cluster, dtype, workload
        self.precision = precision
        self.grid: Grid = make_grid(workload.context)
        source = build(spec, dtype, precision.kv_cache)

        @cache
        def module(tp: int, kvp: int, ffn: str) -> Module:
            fused = fuse(shard(source, tp=tp, kvp=kvp, ffn=ffn))
            return quantize(fused) if precision.weights == FP8 else fused

        @cache
        def tasks(tp: int, kvp: int, ffn: str) -> tuple[Mapping[str, tuple[Task, ...]], Footprint]:
            return count(module(tp, kvp, ffn)), footprint(module(tp, kvp, ffn), cluster.target)

        @cache
        def wiring(tp: int, kvp: int, ffn: str, links: Links) -> Wiring:
            counted, held = tasks(tp, kvp, ffn)
            mesh = module(tp, kvp, ffn).mesh
            terms = price_terms(counted, cluster, dtype, mesh, links, eager=eager)
            return Wiring(terms, held, tabulate(terms))

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

    def wiring(self, layout: Layout) -> Wiring:
        kvp = layout.kvp if layout.helix else min(layout.kvp, 2)  # repeated: all one to a rank
        return self._wiring(layout.tp, kvp, layout.ffn, links_of(layout, self.cluster))

    @property
    def overlaps(self) -> bool:
        """Whether links carry rows while both their ends compute."""
        return self.cluster.target != "cpu"

    def communication_bytes(self, groups: int) -> int:
        """What the communication library allocates for so many process groups of a rank."""
        return groups * self.cluster.communicator_bytes if groups else 0

    def formulas(self, layout: Layout) -> StageFormulas:
        """The expressions that price a layout, by block and part."""
        return stage_formulas(self.wiring(layout).terms)

    def bounds(self, layouts: Sequence[Layout]) -> tuple[Floats, Floats]:
        """Seconds of TBT and of TTFT below which each layout stays, however its requests grow.

        As if every request lay evenly on all groups from its first token on, and, but for helix, met none
        of its peers: the least rows, keys and swaps that any growth leaves to the busiest group.
        """
        tbt_s, ttft_s = np.empty(len(layouts)), np.empty(len(layouts))
        alike: dict[Wiring, list[int]] = defaultdict(list)
        for i, layout in enumerate(layouts):
            alike[self.wiring(layout)].append(i)
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

    def outlook(self, layout: Layout, growth: Growth) -> Outlook:
        wiring, riders = self.wiring(layout), growth.riders(self.workload.concurrency - 1)
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
                self.communication_bytes(process_groups(layout)),
            ),
            footprint=wiring.footprint,
            whole=lambda: self._whole(wiring, growth.spread),
            price=lambda: self._chunks(wiring, growth.spread, riders),
        )
