"""What a simulation found: typed, frozen, as JSON by `codec.to_json`. All times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from ...layout import Layout


@dataclass(frozen=True)
class Spread:
    """Of some values: percentiles to 1 %, mean and greatest exactly."""

    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    most: float


@dataclass(frozen=True)
class ClassResult:
    """Requests of one class: of all, of prompt lengths, or of the traffic's own.

    kept: share of the requests that kept both promises: the first token in time, and no token later than
        first + i·promise; in_time: the first alone; late_tokens: share of the tokens behind the first
    ttft, e2e: from arrival to the first and to the last token; queued: until its first chunk set out
    tbt: gaps between tokens; lateness: behind first + i·promise, of all tokens (0 if not)
    slowdown: TTFT over that of the same request with the engine to itself; jain: (Σx)²/(n·Σx²) of it, 1 where
        all are slowed down alike
    tbt and lateness are None where no request had a second token.
    """

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    kept: float
    in_time: float
    late_tokens: float
    ttft: Spread
    tbt: Spread | None
    lateness: Spread | None
    e2e: Spread
    queued: Spread
    slowdown: Spread
    jain: float


@dataclass(frozen=True)
class StageResult:
    """Share of the time in which a stage computed, and its link to the next one carried rows: of the busiest
    KVP group and on average. link is None behind the last stage, and where hops are the stage's own time."""

    mean: float
    busiest: float
    link: float | None


@dataclass(frozen=True)
class PageEvents:
    """preemptions: requests that gave their pages up; recomputed: tokens that were computed again for it.

    hit_tokens: tokens of prompts that were found in pages when the request first came
    recovered: tokens found in pages when it came again; swapped_out, swapped_in: pages copied
    """

    preemptions: int
    recomputed: int
    recovered: int
    hit_tokens: int
    swapped_out: int
    swapped_in: int


@dataclass(frozen=True)
class Result:
    """A simulation.

    seconds: of simulated time, to the last token; skipped: requests that can never be served
    goodput: requests, and output tokens of requests, that kept their promises, per second
    fairness: Jain's index of the mean slowdowns of the length classes
    mfu: flops that completed requests needed, over time and peak; mbu: bytes of weights, keys and values
        that were read, over time and bandwidth; None where the plan's cluster does not say its peaks
    """

    traffic: str
    engine: str
    policy: str
    seed: int
    layout: Layout
    seconds: float
    requests: int
    skipped: int
    micro_batches: int
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    goodput_requests_per_s: float
    goodput_tokens_per_s: float
    everything: ClassResult
    lengths: tuple[ClassResult, ...]
    kinds: tuple[ClassResult, ...]
    fairness: float
    most_slowed: float
    pages: PageEvents
    stages: tuple[StageResult, ...]
    mfu: float | None
    mbu: float | None


@dataclass(frozen=True)
class Trial:
    """A rate that was tried. kept: share of requests that kept their promises, None: too few, soon seen."""

    qps: float
    kept: float | None


@dataclass(frozen=True)
class Capacity:
    """The highest rate, in requests per second, at which `share` of the requests keep their promises.

    0 where even the lowest rate tried is too much. trials: in the order in which they were made
    """

    qps: float
    share: float
    trials: tuple[Trial, ...]
    result: Result | None
