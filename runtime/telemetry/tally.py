"""Histograms that the engine's thread can afford: to add costs a third of a microsecond, any thread may read.

Their fields in `Tallies` are named as Prometheus shows them; what each counts, in words, is in the server's
`metrics`. Bounds are upper ends, inclusive, as there; beyond the last lies infinity.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

LONG_S = (
    *(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600),
    *(1200, 1800, 3600, 7200, 14400, 28800),
)
"""Times of requests: a prompt of 10 M tokens may take hours."""
SHORT_S = (0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
"""Times of tokens and micro-batches."""
TOKENS = tuple(m * 10**e for e in range(8) for m in (1, 2, 5))[:-2]
"""Lengths of prompts and answers."""
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a micro-batch."""
RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)
"""Predicted over measured."""


class Tally:
    """counts: of what was at most each bound and above the one before, then of the rest; sum: of all."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += times * value


def percentile(bounds: Sequence[float], counts: Sequence[int], percent: float) -> float | None:
    """Of what was counted: linear within a bucket, as Prometheus' histogram_quantile; None of nothing.

    Above the last bound nothing is known: that bound.
    """
    rank = sum(counts) * percent / 100
    if not rank:
        return None
    below, low = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return low + (bound - low) * (rank - below) / count
        below, low = below + count, bound
    return float(bounds[-1])


class Tallies:
    """Of requests, of tokens, of micro-batches."""

    def __init__(self) -> None:
        self.time_to_first_token_seconds = Tally(LONG_S)
        self.inter_token_latency_seconds = Tally(SHORT_S)
        self.request_time_per_output_token_seconds = Tally(SHORT_S)
        self.e2e_request_latency_seconds = Tally(LONG_S)
        self.request_queue_time_seconds = Tally(LONG_S)
        self.request_prefill_time_seconds = Tally(LONG_S)
        self.request_decode_time_seconds = Tally(LONG_S)
        self.request_inference_time_seconds = Tally(LONG_S)
        self.request_prompt_tokens = Tally(TOKENS)
        self.request_generation_tokens = Tally(TOKENS)
        self.request_params_max_tokens = Tally(TOKENS)
        self.iteration_tokens_total = Tally(ROWS)
        self.iteration_time_seconds = Tally(SHORT_S)
        self.iteration_time_predicted_over_measured = Tally(RATIOS)
        self.ttft_predicted_over_measured = Tally(RATIOS)
