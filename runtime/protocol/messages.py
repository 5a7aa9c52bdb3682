"""What engine and workers say to each other, without torch; `wire` makes messages of it.

Engine → every worker, once per micro-batch, a `Step`: who comes (with the prompt and its pages, once),
who gets further pages, who goes, which sequences decode which token, how many more prompt tokens of which
requests to prefill. All workers see all steps in one order, so everything else (lengths, page tables,
positions) is replicated state that each of them derives, and never travels.

A worker that was started from outside says `Hello` until it hears `Welcome` or `Refused`.

Worker → engine: `Ready` or `Failed` once, then a `Done` per micro-batch from tensor-parallel rank 0
of the last stage of every KVP group that had rows in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..request import Logits, Sampling, Top

Run = tuple[int, int]
"""Consecutive pages: (first page, number of pages)."""


@dataclass(frozen=True)
class Admission:
    """A request begins, or goes on after it was preempted: then under a new id.

    home: its first KVP group; kv_tokens: cached at most
    tokens: its prompt and, after a preemption, what has been generated: the last `generated` of them
    cached: how many of them have their K/V in the pages already: its first chunk starts there
    pages: by KVP group, its pages there, in order (empty where it has none)
    """

    id: int
    home: int
    kv_tokens: int
    sampling: Sampling
    logits: Logits
    tokens: Sequence[int]
    generated: int
    cached: int
    pages: tuple[tuple[Run, ...], ...]


class MorePages(NamedTuple):
    """A request gets further pages on a KVP group, behind those that it has there."""

    id: int
    group: int
    pages: tuple[Run, ...]


@dataclass(frozen=True)
class Copies:
    """Pages of a KVP group go to host memory, or come back: of every layer, K and V.

    pairs: (page, host slot); done before the step's program runs and after those of all steps before it.
    """

    group: int
    out: bool
    pairs: Sequence[tuple[int, int]]


Change = Admission | MorePages | Copies | int
"""In this order they are carried out. An int is the id of a request that is over, or preempted."""


@dataclass(frozen=True)
class Step:
    """One micro-batch: changes, then (id, token) of each decode and (id, rows) of each prefill chunk."""

    number: int
    changes: Sequence[Change] = ()
    decodes: Sequence[tuple[int, int]] = ()
    chunks: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Hello:
    """A worker from outside is there. digest: of its plan's manifest; host: its machine's name"""

    rank: int
    world: int
    digest: str
    host: str


@dataclass(frozen=True)
class Welcome:
    """All ranks are there and may begin. token: what this set of workers is called"""

    token: str


@dataclass(frozen=True)
class Refused:
    """The worker can never be one of this engine's. sentence: for people"""

    sentence: str


@dataclass(frozen=True)
class Ready:
    """The worker has its weights and waits for steps."""

    rank: int


@dataclass(frozen=True)
class Failed:
    """The worker gives up. sentence: for people; exit_code: of the error's class; trace: for us."""

    rank: int
    sentence: str
    exit_code: int
    trace: str = ""


@dataclass(frozen=True)
class Done:
    """A group is through with a step: sampled (request, token), and what else was asked for.

    logits: (request, the first row's position, float32 rows as bytes)
    busy_s: what the last stage computed and waited
    logprobs: (request, its token's logprob, the likeliest tokens' (id, logprob))
    """

    number: int
    group: int
    tokens: Sequence[tuple[int, int]]
    logits: Sequence[tuple[int, int, bytes]]
    busy_s: float
    logprobs: Sequence[tuple[int, float, Top]] = ()


Reply = Ready | Failed | Done
