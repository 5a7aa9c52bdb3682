"""Speeds that codegen is told: of kernels, as measured, by which it chooses them; of copies of pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Speeds:
    """A kernel's speed by size. points: (size, context, speed), in ascending order.

    Of "attention_prefill": the rows that share a KV head's keys (a chunk's × query heads of a KV head), the
    keys they see, and FLOP/s. Of "attention_decode": requests, the keys each of them sees, and B/s.
    """

    points: tuple[tuple[float, float, float], ...]
    unit: str
    source: str


@dataclass(frozen=True)
class Swap:
    """Seconds of a copy to or from host memory: to begin with, and per KV page of a rank's layers."""

    latency_s: float
    page_s: float


KernelSpeeds: TypeAlias = Mapping[str, Mapping[str, Speeds]]
"""By op, then by provider: "triton" is mnemoc's own."""
