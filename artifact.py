"""The contract between compile time and run time: what a plan says.

The planner makes a `Plan`, codegen turns it into a `folder`, the runtime reads it back; none of the three
imports another. Everything here is frozen data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .alternatives import Alternative, Frontier, Marginal
from .layout import Layout

FORMAT = 6

CONTIGUOUS = "contiguous"
"""In place of a stripe's tokens: a request's KV cache is cut once, into one run of tokens per group."""

NEVER_HALVED = "off"
"""In place of the rows from which chunks go through layers in two halves."""

NCCL = "nccl"
"""In place of what pays: every sum over tensor-parallel ranks is NCCL's."""

LENT = 32
"""What computes beside messages leaves one of so many multiprocessors to them. (NCCL's kernels need places of
their own at once: behind a grid that holds all places until it ends, nothing would travel meanwhile.)"""

FP8 = "fp8"
PRECISIONS = ("auto", FP8)


@dataclass(frozen=True)
class Precision:
    """What is kept in fewer bits than the model's own: each of PRECISIONS, "auto" being the plan's dtype.

    weights:  "fp8": the products of the layers are of e4m3 by e4m3 (W8A8), weights with a scale per output
              channel, rows with one per token; embedding, norms and head stay as they are
    kv_cache: "fp8": keys and values are kept as e4m3, without scales; attention computes as ever
    """

    weights: str = "auto"
    kv_cache: str = "auto"

    @property
    def fp8(self) -> bool:
        """Whether anything is."""
        return FP8 in (self.weights, self.kv_cache)


AUTO = Precision()


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: a slice of the program; `role` names its file in schedule/."""

    role: str
    first_layer: int
    num_layers: int


@dataclass(frozen=True)
class ChunkRule:
    """For `start <= n < end` cached tokens: prefill in chunks of `chunk` tokens, on `groups` groups.

    iteration_s: predicted time from one chunk to the next at the bucket's end, in a full pipeline.
    """

    start: int
    end: int
    chunk: int
    groups: int
    iteration_s: float


@dataclass(frozen=True)
class Prediction:
    """Predicted figures; `*_parts_s` add up to the whole (linear, attention, communication, …)."""

    ttft_s: float
    tbt_s: float
    throughput_tokens_per_s: float
    ttft_parts_s: Mapping[str, float]
    tbt_parts_s: Mapping[str, float]


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank: what the promise needs, for the micro-batch that needs most, and then room.

    activation: rows as they go through the program; workspace: of kernels, page tables and token ids;
    communication: what is sent and received, and the library's own buffers; reserve: left to the device's
    context and the allocator; capacity: the device's, reserve and all
    step: that micro-batch, in words
    room: what is left serves more than was promised: KV pages beyond the promise's, and beyond its step what
    `max_rows` rows need, with the ids and page tables of further requests
    """

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    workspace_bytes: int
    communication_bytes: int
    reserve_bytes: int
    capacity_bytes: int
    step: str
    room_kv_bytes: int = 0
    room_step_bytes: int = 0

    @property
    def parts(self) -> Mapping[str, int]:
        """What the promise needs, by name."""
        return {
            "weights": self.weights_bytes,
            "kv": self.kv_bytes,
            "activation": self.activation_bytes,
            "workspace": self.workspace_bytes,
            "communication": self.communication_bytes,
            "reserve": self.reserve_bytes,
        }

    @property
    def promised_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def room_bytes(self) -> int:
        return self.room_kv_bytes + self.room_step_bytes

    @property
    def used_bytes(self) -> int:
        return self.promised_bytes + self.room_bytes

    @property
    def fits(self) -> bool:
        return self.used_bytes <= self.capacity_bytes


@dataclass(frozen=True)
class Optimality:
    """What the solver proved. objective and bound are in the unit that `minimised` names."""

    minimised: str
    objective: float
    bound: float
    gap: float


@dataclass(frozen=True)
class Workload:
    """The promise: what is to be served and how quickly. Counts in tokens, times in seconds."""

    context: int
    ttft_s: float
    tbt_s: float
    output_tokens: int = 256
    concurrency: int = 1
    objective: str = "gpus"


@dataclass(frozen=True)
class Plan:
    """What the planner decided.

    page_size: tokens per KV page; num_pages: pages per rank and layer: all that memory has room for.
    host_pages: KV pages that a rank's share of host memory keeps; 0: none
    stripe_tokens: KVP growth: a request's tokens are dealt to its groups in stripes of so many, so it takes
        on its next group after each, until all have joined.
    max_batch: sequences that may decode together: at least those promised.
    max_rows: the most rows of a micro-batch for which memory was counted, those of a KVP group; of them
        max_batch + 1 may want logits.
    overlap_rows: chunks of at least so many rows that are on several KVP groups go through layers in two
        halves, so that one's partial results travel while the other is computed; 0: none do
    one_shot_rows: sums over tp of at most so many rows are made by the kernel that reads them next, an add or
        an add and norm, from the peers' memory; NCCL makes all others
    precision: what is not kept as dtype; eager: kernels are launched one by one, not by CUDA graphs.
    binding: the constraint without which the objective would be better: a name of the program, or "none".
    marginals, frontier: what else could be had and at what price; the frontier only where asked for.
    """

    target: str
    dtype: str
    layout: Layout
    stages: tuple[Stage, ...]
    chunks: tuple[ChunkRule, ...]
    page_size: int
    num_pages: int
    stripe_tokens: int
    max_batch: int
    max_rows: int
    predicted: Prediction
    memory: Memory
    optimality: Optimality
    binding: str
    alternatives: tuple[Alternative, ...]
    marginals: tuple[Marginal, ...] = ()
    frontier: Frontier | None = None
    notes: tuple[str, ...] = ()
    precision: Precision = AUTO
    eager: bool = False
    host_pages: int = 0
    overlap_rows: int = 0
    one_shot_rows: int = 0

    @property
    def gpus(self) -> int:
        return self.layout.gpus

    @property
    def promised_pages(self) -> int:
        """Of num_pages, those that the promised requests fill."""
        held = self.memory
        return self.num_pages * held.kv_bytes // max(1, held.kv_bytes + held.room_kv_bytes)

    def chunk_at(self, cached: int) -> int:
        """Planned chunk size for a prompt of which `cached` tokens are done."""
        for rule in self.chunks:
            if cached < rule.end:
                return rule.chunk
        return self.chunks[-1].chunk


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `files` maps each other file, by relative path, to its sha256."""

    model: Mapping[str, Any]
    cluster: Mapping[str, Any]
    workload: Workload
    plan: Plan
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT
    mnemoc: str = "0.1.0"
