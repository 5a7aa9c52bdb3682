"""The last minutes: what the engine's counters have gained since a reading before.

Counters only grow; a reading of them now and then, and the difference to an older one, says what the last
minutes were like, and costs the engine nothing. Whoever looks or scrapes takes a reading.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from dataclasses import dataclass

from ..telemetry.machine import Machine, Work
from ..telemetry.stats import Stats
from ..telemetry.tally import Tally, percentile

EVERY_S = 2.0
"""Between two readings that are kept."""
UTILIZATION_S = 60.0
WINDOW_S = 300.0


@dataclass(frozen=True)
class Reading:
    """Counters at a time on time.monotonic's clock. ttft, tbt: counts by bucket"""

    at_s: float
    prompt_tokens: int
    generated_tokens: int
    work: Work
    ttft: tuple[int, ...]
    tbt: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """Percentiles of times in seconds; None where nothing happened."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Lately:
    """The last `seconds`: rates per second, and shares of the plan's peaks where it knows them."""

    seconds: float
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    ttft: Spread
    tbt: Spread
    mfu: float | None
    mbu: float | None


class Recent:
    """Keeps readings of the last minutes. From any thread."""

    def __init__(self, stats: Stats, machine: Machine) -> None:
        self._stats = stats
        self._machine = machine
        self._lock = threading.Lock()
        self._readings: deque[Reading] = deque([self._read(time.monotonic())])

    def lately(self, window_s: float = WINDOW_S) -> Lately:
        """What happened since the oldest reading of the window."""
        before, now = self._span(window_s)
        seconds = max(now.at_s - before.at_s, 1e-9)
        mfu, mbu = self._shares(before, now)
        tallies = self._stats.tallies
        return Lately(
            seconds,
            (now.prompt_tokens - before.prompt_tokens) / seconds,
            (now.generated_tokens - before.generated_tokens) / seconds,
            _spread(tallies.time_to_first_token_seconds, before.ttft, now.ttft),
            _spread(tallies.inter_token_latency_seconds, before.tbt, now.tbt),
            mfu,
            mbu,
        )

    def utilization(self) -> tuple[float | None, float | None]:
        """MFU and MBU of the last minute."""
        return self._shares(*self._span(UTILIZATION_S))

    def _span(self, window_s: float) -> tuple[Reading, Reading]:
        now = self._read(time.monotonic())
        with self._lock:
            readings = self._readings
            if now.at_s - readings[-1].at_s >= EVERY_S:
                readings.append(now)
            while len(readings) > 1 and readings[1].at_s <= now.at_s - WINDOW_S:
                readings.popleft()
            inside = (one for one in readings if one.at_s >= now.at_s - window_s)
            return next(inside, readings[-1]), now

    def _read(self, at_s: float) -> Reading:
        stats = self._stats
        return Reading(
            at_s,
            stats.prompt_tokens,
            stats.generated_tokens,
            dataclasses.replace(stats.work),
            tuple(stats.tallies.time_to_first_token_seconds.counts),
            tuple(stats.tallies.inter_token_latency_seconds.counts),
        )

    def _shares(self, before: Reading, now: Reading) -> tuple[float | None, float | None]:
        machine, seconds = self._machine, max(now.at_s - before.at_s, 1e-9)
        shares: list[float | None] = []
        for measure, peak in (
            (machine.work_flops, machine.peak_flops),
            (machine.work_bytes, machine.peak_bytes),
        ):
            done = measure(now.work) - measure(before.work)
            shares.append(None if peak is None else done / seconds / peak)
        return shares[0], shares[1]


def _spread(tally: Tally, before: tuple[int, ...], now: tuple[int, ...]) -> Spread:
    gained = [after - earlier for earlier, after in zip(before, now, strict=True)]
    return Spread(*(percentile(tally.bounds, gained, percent) for percent in (50, 90, 99)))
