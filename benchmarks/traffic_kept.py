"""What simulations of traffic have shown, as a file: benchmarks/results/paper_traffic.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mnemoc.codec import from_json
from mnemoc.runtime.simulation import ClassResult

KEPT = Path(__file__).parent / "results" / "paper_traffic.json"


@dataclass(frozen=True)
class Class:
    """Requests of one kind: TTFT and time between tokens in seconds, shares that kept promises."""

    requests: int
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tbt_mean_s: float | None
    tbt_p99_s: float | None
    in_time: float
    kept: float

    @classmethod
    def of(cls, found: ClassResult) -> Class:
        ttft, tbt = found.ttft, found.tbt
        return cls(
            found.requests,
            rounded(ttft.p50),
            rounded(ttft.p90),
            rounded(ttft.p99),
            None if tbt is None else rounded(tbt.mean),
            None if tbt is None else rounded(tbt.p99),
            rounded(found.in_time),
            rounded(found.kept),
        )


@dataclass(frozen=True)
class Seen:
    """What one simulation showed. how: plan, policy or baseline; goodput, throughput: requests a second.

    busy: share of the time in which the busiest stage computed
    """

    figure: str
    how: str
    qps: float
    share: float
    duration_s: float
    all: Class
    chats: Class
    long: Class | None
    goodput: float
    throughput: float
    preemptions: int
    busy: float
    tbt_promise_s: float


@dataclass(frozen=True)
class Capacity:
    """The highest of RATES, in requests per second, that still meets the bar; 0: none does."""

    how: str
    bar: str
    qps: float


@dataclass(frozen=True)
class Kept:
    """The file."""

    seen: tuple[Seen, ...]
    capacities: tuple[Capacity, ...]

    def of(self, figure: str, how: str, qps: float, share: float | None = None) -> Seen:
        (found,) = (
            one
            for one in self.seen
            if (one.figure, one.how, one.qps) == (figure, how, qps) and share in (None, one.share)
        )
        return found

    def capacity(self, how: str, bar: str) -> float:
        (found,) = (one.qps for one in self.capacities if (one.how, one.bar) == (how, bar))
        return found


@cache
def kept() -> Kept:
    """What was found last."""
    return from_json(Kept, json.loads(KEPT.read_text()), str(KEPT))


def rounded(value: float) -> float:
    return float(f"{value:.4g}")
