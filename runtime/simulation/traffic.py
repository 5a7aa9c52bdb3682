"""What a simulation is fed with: requests in the order in which they come, made or read one by one.

A million of them are no more in memory than ten: every consumer takes them from an iterator. So that a
request which the plan can never serve is refused before anything has run, traffic is gone through twice:
first by `survey`, which also says how much there is to do, then by the simulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ...errors import BadInput
from ..request import Promise
from ..scheduling.limits import Limits

MOST_TOKENS = 10**9
MOST_SECONDS = 10**9
"""Of one request, and of a whole trace: beyond them a figure is taken for a mistake."""
LEAST_QPS, MOST_QPS = 1e-9, 1e6
"""Requests per second that a simulation can be asked for."""

NO_PROMISE = Promise()


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. time_s: since the traffic began; kind: its class.

    blocks: of the prompt's blocks of `block_tokens` tokens each, the last one perhaps a part, an id that
        stands for the block with all before it, below 2^64: a common beginning is one of blocks
    """

    time_s: float
    prompt: int
    output: int
    kind: str = ""
    promise: Promise = NO_PROMISE
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


class Traffic(Protocol):
    """Where requests come from."""

    @property
    def name(self) -> str: ...

    def arrivals(self) -> Iterator[Arrival]:
        """All requests by time; the same ones each time it is called."""
        ...

    def where(self, index: int) -> str:
        """What to call the request of that index, for errors."""
        ...

    def at(self, qps: float) -> Traffic:
        """The same requests at another rate, in requests per second."""
        ...


def page_hashes(arrival: Arrival, page_size: int, unique: int) -> list[bytes]:
    """Of each whole page of the prompt, a name for its tokens with all before them.

    Within the arrival's blocks, by the block in which the page ends, and where in it; behind them, and where
    there are none, by `unique`, which stands for this request alone.
    """
    block_tokens, blocks = arrival.block_tokens, arrival.blocks
    known = min(arrival.prompt, len(blocks) * block_tokens) // page_size
    hashes = []
    for end in range(page_size - 1, known * page_size, page_size):
        block, offset = divmod(end, block_tokens)
        hashes.append((blocks[block] * block_tokens + offset).to_bytes(16, "big"))
    own = (1 << 127) + (unique << 64)
    pages = range(known, arrival.prompt // page_size)
    return [*hashes, *((own + page).to_bytes(16, "big") for page in pages)]


@dataclass(frozen=True)
class Survey:
    """requests: that can be served; skipped: that cannot; last_s: when the last one comes."""

    requests: int
    skipped: int
    last_s: float


def survey(traffic: Traffic, limits: Limits, *, skip: bool) -> Survey:
    """Read all of it once. BadInput for a request that can never be served, unless those are skipped."""
    requests, skipped, last_s = 0, 0, 0.0
    for index, arrival in enumerate(traffic.arrivals()):
        last_s = arrival.time_s
        why = limits.refusal(arrival.prompt, arrival.output)
        if why is None:
            requests += 1
        elif skip:
            skipped += 1
        else:
            raise BadInput(
                why.what,
                where=traffic.where(index),
                do="plan with a larger --context, or leave such requests out with --skip-unservable",
            )
    if not requests:
        what = "no request in it can be served" if skipped else "no requests"
        raise BadInput(what, where=traffic.name)
    return Survey(requests, skipped, last_s)
