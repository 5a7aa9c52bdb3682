"""A layout with its growth, priced over (bucket, chunk size), and what any split of its stages makes of it.

A stage's time for one micro-batch, from the formulas of `cost`, with λ its layers:

    τ_s = step + entry + λ_s·layer + [s first]·embed + [s last and R > 0]·head + [s not last]·hop

**TTFT.** Chunks pass the p stages one behind the other. A chunk's way through the pipeline's critical path
counts its slowest stage once, and the p − 1 further steps down cost at most the slowest of all, so

    TTFT ≤ Σ_chunks pace + (p − 1)·max_chunks max_s τ_s + head             (the last chunk's logits)

**Pace** is the time from one chunk to the next in a full pipeline, max_s τ_s. But a GPU's link carries rows
while both its ends compute (programs post each receive a step ahead), as long as enough micro-batches are
on their way: 2p − 1, which the engine keeps while nobody decodes. Without riders the link is then a
station of its own between two stages: pace = max(hop, max_s τ_s − [s not last]·hop). Where the cores
carry the messages themselves (a CPU), and with riders, of whom p are on their way, the hop counts as above.

**TBT.** While a long prefill keeps p micro-batches in flight, a decode that rides one of them waits for all:
p·max_s τ_s. Decodes alone cross the stages once: Σ_s τ_s. Riders are the other requests of the promise
(concurrency − 1), each at full length; alone, all of them decode in one micro-batch, which also defines

    throughput = concurrency / Σ_s τ_s(decodes of full length)             tokens/s in steady decode

Chunks keep to the TBT promise also where concurrency is 1: the engine serves others beside it.

**Memory** of the fullest stage: its weights, its layers' KV pages for the promised concurrency, and the
activations, workspace and communication buffers of the micro-batch that needs most: a chunk of the prompt,
with the decodes that ride it, or the decodes of all requests at once (`footprint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..layout import Layout
from .chunks import Floats, Samples, Sizes, decode_sizes
from .cost import Terms
from .footprint import Footprint, Kept, Step
from .space import Growth, splits

Blocks = Mapping[str, Floats]
Seconds: TypeAlias = Blocks | Mapping[str, float]
Count: TypeAlias = int | NDArray[np.int64]
NEVER = math.inf


@dataclass(frozen=True, eq=False)
class Wiring:
    """What formulas depend on: a mesh with its links. `totals`: sizes → seconds by block.

    overlap_rows: as in `artifact.Plan`; 0 where terms have no block of halves
    """

    terms: Terms
    footprint: Footprint
    totals: Callable[[Sizes], Blocks]
    overlap_rows: int = 0


@dataclass(frozen=True)
class Chunks:
    """The sampled chunks: their sizes, those that are priced (see `chunks`), and seconds by block [5, B, C].

    sums, ends [B, C]: by block, seconds of the bucket's chunks, and of its last whole one (or the rest)
    """

    samples: Samples
    sizes: Sizes
    priced: Sizes
    blocks: Blocks

    @cached_property
    def sums(self) -> Blocks:
        return {name: (self.samples.weight * s).sum(axis=0) for name, s in self.blocks.items()}

    @cached_property
    def ends(self) -> Blocks:
        whole = self.samples.weight[:4].any(axis=0)
        return {name: np.where(whole, s[3], s[4]) for name, s in self.blocks.items()}


@dataclass(frozen=True, eq=False)
class Outlook:
    """A layout with its growth, before any choice of split and chunks.

    decode_s: TBT of decodes alone at full length; head_s: what the last chunk's logits add
    (with riders every chunk has them); kept: bytes held from step to step;
    overlap_rows: as in `artifact.Plan`; rides: whether decodes share the prefill's micro-batches;
    overlaps: whether hops run beside its stages;
    whole, price: price the prompt as one chunk, without exchange, and in chunks, when asked
    """

    layout: Layout
    growth: Growth
    num_layers: int
    decode_s: float
    head_s: float
    rides: bool
    overlaps: bool
    kept: Kept
    footprint: Footprint
    overlap_rows: int
    whole: Callable[[], Mapping[str, float]]
    price: Callable[[], Chunks]

    @cached_property
    def floor_s(self) -> float:
        """A bound on TTFT that costs next to nothing."""
        return float(balanced(self.whole(), 0.0, self.layout.spp, self.num_layers))

    @cached_property
    def chunks(self) -> Chunks:
        return self.price()

    @property
    def blocks(self) -> Blocks:
        return self.chunks.blocks

    @property
    def gpus(self) -> int:
        return self.layout.gpus

    @cached_property
    def layer_bytes(self) -> int:
        """Weights and KV pages of one layer."""
        tokens = self.growth.pages * self.growth.page_size
        return self.footprint.layer + tokens * self.footprint.kv_per_token

    def stage_bytes(self, split: tuple[int, ...]) -> list[int]:
        """Weights and KV pages of each stage."""
        sizes = [count * self.layer_bytes for count in split]
        sizes[0] += self.footprint.embed
        sizes[-1] += self.footprint.head
        return sizes

    @property
    def decodes(self) -> Sizes:
        """All requests decode one token."""
        return decode_sizes(self.growth.riders(self.growth.concurrency))

    @cached_property
    def decode_bytes(self) -> int:
        """What decodes alone need beside weights and KV, whatever the chunks."""
        return int(self.footprint.step_bytes(self.decodes, self.layout.spp, self.kept))

    @cached_property
    def step_bytes(self) -> Floats:
        """[B, C]: beside weights and KV, of decodes alone or the dearest chunk that the entry stands for."""
        used = self.chunks.samples.weight > 0
        held = self.footprint.step_bytes(self.chunks.sizes, self.layout.spp, self.kept)
        return np.asarray(np.maximum(np.where(used, held, 0).max(axis=0), self.decode_bytes))

    def step(self, sizes: Sizes) -> Step:
        """What micro-batches need beside weights and KV."""
        return self.footprint.step(sizes, self.layout.spp, self.kept)

    @cached_property
    def flat(self) -> Floats:
        """What each stage pays whatever its layers, less the hop: [5, B, C]."""
        return np.asarray(self.blocks["step"] + self.blocks["entry"])

    def slowest(self, split: tuple[int, ...]) -> Floats:
        """Seconds of the slowest stage, hop and all: [5, B, C]."""
        return np.asarray(np.maximum.reduce(self._stage_times(split, self.blocks["hop"])))

    def pace(self, split: tuple[int, ...]) -> Floats:
        """Seconds from one chunk to the next in a full pipeline: [5, B, C]."""
        if not self.overlaps:
            return self.slowest(split)
        stations = [*self._stage_times(split, 0.0), self.blocks["hop"]]
        return np.asarray(np.maximum.reduce(stations))

    def _stage_times(self, split: tuple[int, ...], hop: Floats | float) -> list[Floats]:
        """Of the stages that can be slowest (first, tallest between, last)."""
        layer, embed = self.blocks["layer"], self.blocks["embed"]
        head = self.blocks["head"] if self.rides else 0.0
        if len(split) == 1:
            return [self.flat + embed + split[0] * layer + head]
        first = self.flat + embed + split[0] * layer + hop
        between = [self.flat + max(split[1:-1]) * layer + hop] if len(split) > 2 else []
        return [first, *between, self.flat + split[-1] * layer + head]

    def summed(self, seconds: Floats) -> Floats:
        """[5, B, C] → [B, C]: the sum over a bucket's chunks."""
        return np.asarray((self.chunks.samples.weight * seconds).sum(axis=0))

    def dearest(self, seconds: Floats) -> Floats:
        """[5, B, C] → [B, C]: of the dearest of a bucket's chunks."""
        used = self.chunks.samples.weight > 0
        return np.asarray(np.where(used, seconds, 0).max(axis=0))

    def bound_s(self, tbt_s: float) -> float:
        """No split and no chunks of this layout reach a TTFT below this."""
        cost = self._balanced(self.chunks.sums, hops=not self.overlaps)
        tau = self._balanced(self.chunks.ends, hops=True)
        allowed = self.chunks.samples.allowed & (self.layout.spp * tau <= tbt_s)
        if not allowed.any(axis=1).all():
            return NEVER
        sums = np.where(allowed, cost, NEVER).min(axis=1).sum()
        fill = np.where(allowed, tau, NEVER).min(axis=1).max()
        return float(sums + (self.layout.spp - 1) * fill + self.head_s)

    def _balanced(self, blocks: Blocks, *, hops: bool) -> Floats:
        """A lower bound on the slowest stage of any split."""
        stages = self.layout.spp
        ends = blocks["head"] if self.rides else np.zeros(())
        if hops:
            ends = ends + (stages - 1) * blocks["hop"]
        return balanced(blocks, ends, stages, self.num_layers)

    @cached_property
    def excess(self) -> float:
        """ρ of `space`: embed or head in layers, by time or by weight, at most."""
        head = self.blocks["head"] if self.rides else np.zeros(1)
        times = max(
            float((end / self.blocks["layer"]).max()) for end in (self.blocks["embed"], head)
        )
        return max(times, max(self.footprint.embed, self.footprint.head) / self.layer_bytes)

    def splits(self) -> tuple[tuple[int, ...], ...]:
        return splits(self.num_layers, self.layout.spp, self.excess)


def crossing(blocks: Seconds, stages: Count, layers: int) -> Floats:
    """A micro-batch's way through all stages, one after the other."""
    each = blocks["step"] + blocks["entry"]
    once = blocks["embed"] + layers * blocks["layer"] + blocks["head"]
    return np.asarray(stages * each + once + (stages - 1) * blocks["hop"])


def balanced(blocks: Seconds, more: Floats | float, stages: Count, layers: int) -> Floats:
    """The slowest of some stages takes no less than their mean, or than the tallest one's layers.

    more: what they share beside the embedding and the layers
    """
    layer, flat = blocks["layer"], blocks["step"] + blocks["entry"]
    mean = flat + (blocks["embed"] + more + layers * layer) / stages
    return np.asarray(np.maximum(mean, flat + np.ceil(layers / stages) * layer))
