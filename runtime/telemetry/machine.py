"""What a plan's machine could do, and what requests need of it: for shares of its peaks (MFU, MBU).

Per token and layer, products of 2·D·(2·h_q + 2·h_kv)·d + 2·3·D·F flops; per query–key pair and layer,
4·h_q·d; per sampled token, the head's 2·D·V. A micro-batch reads, on each KVP group that has rows in it, the
weights of all stages, and the keys and values that its queries see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...artifact import FP8, Manifest
from ..scheduling.cost import Load

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Work:
    """What micro-batches had to compute, and to read: `Machine` knows its flops and bytes.

    rows: tokens, each once; pairs: of queries and keys; sampled: rows whose logits were wanted; keys: cached
    tokens read; groups, heads: how often a KVP group, and one that samples, reads its weights; micro_batches
    """

    micro_batches: int = 0
    rows: int = 0
    pairs: int = 0
    sampled: int = 0
    keys: int = 0
    groups: int = 0
    heads: int = 0

    def add(self, rows: int, loads: Iterable[Load]) -> None:
        """A micro-batch of so many tokens. loads: of its groups"""
        self.micro_batches += 1
        self.rows += rows
        for load in loads:
            self.pairs += load.QK + load.KD
            self.sampled += load.R
            self.keys += load.KV + load.KD
            self.groups += 1
            self.heads += load.R > 0


@dataclass(frozen=True)
class Machine:
    """Over all layers and devices: flops by what they are for, bytes of weights and of a token's K and V.

    repeated_bytes: of QKV, which every KVP group has; cut_bytes: of what helix cuts over groups, the rest
    peak_flops, peak_bytes: per second; None where the plan's cluster does not say
    """

    token_flops: float
    pair_flops: float
    head_flops: float
    repeated_bytes: float
    cut_bytes: float
    head_bytes: float
    kv_bytes: float
    groups: int
    helix: bool
    peak_flops: float | None
    peak_bytes: float | None

    @classmethod
    def of(cls, manifest: Manifest) -> Machine:
        plan, m = manifest.plan, manifest.model
        layers, hidden, vocab = int(m["num_layers"]), int(m["hidden"]), int(m["vocab"])
        heads, kv_heads = int(m["num_heads"]), int(m["num_kv_heads"])
        width = int(m["head_dim"])
        inputs = layers * hidden * (heads + 2 * kv_heads) * width
        rest = layers * (hidden * heads * width + 3 * hidden * int(m["ffn"]))
        own = BYTES[plan.dtype]
        weight = 1 if plan.precision.weights == FP8 else own
        cached = 1 if plan.precision.kv_cache == FP8 else own
        copies = max(1.0, plan.layout.tp / kv_heads)  # of each KV head, beyond their number
        numbers = manifest.cluster.get("numbers", {})
        peak = "peak.float8" if plan.precision.weights == FP8 else f"peak.{plan.dtype}"
        return cls(
            token_flops=2.0 * (inputs + rest),
            pair_flops=4.0 * layers * heads * width,
            head_flops=2.0 * hidden * vocab,
            repeated_bytes=float(inputs * weight),
            cut_bytes=float(rest * weight),
            head_bytes=float(hidden * vocab * own),
            kv_bytes=2.0 * layers * kv_heads * width * cached * copies,
            groups=plan.layout.kvp,
            helix=plan.layout.helix,
            peak_flops=_all_devices(numbers, peak, plan.gpus),
            peak_bytes=_bandwidth(numbers, plan.gpus),
        )

    def flops(self, start: int, prompt: int, output: int) -> float:
        """Of a request, `start` tokens of whose prompt were found in pages."""
        last = prompt + output - 1  # the last token generated is never an input
        pairs = (last * (last + 1) - start * (start + 1)) / 2
        return (
            (last - start) * self.token_flops + pairs * self.pair_flops + output * self.head_flops
        )

    def work_flops(self, work: Work) -> float:
        """Of micro-batches; also of what is computed again after a preemption."""
        return (
            work.rows * self.token_flops
            + work.pairs * self.pair_flops
            + work.sampled * self.head_flops
        )

    def work_bytes(self, work: Work) -> float:
        """That micro-batches read, on all groups."""
        cut = work.micro_batches if self.helix else work.groups
        return (
            work.keys * self.kv_bytes
            + work.groups * self.repeated_bytes
            + cut * self.cut_bytes
            + work.heads * self.head_bytes
        )


def _all_devices(numbers: Mapping[str, Any], key: str, devices: int) -> float | None:
    return float(numbers[key]["value"]) * devices if key in numbers else None


def _bandwidth(numbers: Mapping[str, Any], devices: int) -> float | None:
    """Bytes per second; of devices that share their node's memory, no more than that."""
    found = _all_devices(numbers, "memory.bandwidth", devices)
    shared = _all_devices(numbers, "memory.shared_bandwidth", 1)
    if found is None or shared is None:
        return found
    nodes = -(-devices // int(numbers["devices_per_node"]["value"]))
    return min(found, shared * nodes)
