"""What engine and workers say to each other: JSON headers with raw frames behind them. No torch.

Engine → every worker, once per micro-batch, a `Step`: who comes (with the prompt, once), who goes,
which sequences decode which token, how many more prompt tokens of which requests to prefill. All
workers see all steps in one order, so everything else (lengths, page tables, positions) is
replicated state that each of them derives, and never travels.

Worker → engine: `Ready` or `Failed` once, then a `Done` per micro-batch from tensor-parallel rank 0
of the last stage of every KVP group that had rows in it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .request import Logits, Sampling

Frames = list[bytes]

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


@dataclass(frozen=True)
class MorePages:
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
    """A group is through with a step: sampled (request, token), and logits rows where wanted.

    logits: (request, float32 rows as bytes); busy_s: what the last stage computed and waited.
    """

    number: int
    group: int
    tokens: Sequence[tuple[int, int]]
    logits: Sequence[tuple[int, bytes]]
    busy_s: float


Reply = Ready | Failed | Done


def encode_step(step: Step) -> Frames:
    changes: list[Any] = []
    frames = []
    for change in step.changes:
        if isinstance(change, int):
            changes.append(change)
        else:
            s = change.sampling
            sampling = [s.temperature, s.top_p, s.top_k, s.seed]
            changes.append([change.id, change.home, change.kv_tokens, sampling, change.logits])
            frames.append(change.prompt.tobytes())
    header = [step.number, changes, step.decodes, step.chunks]
    return [json.dumps(header).encode(), *frames]


def decode_step(frames: Frames) -> Step:
    number, raw, decodes, chunks = json.loads(frames[0])
    prompts = iter(frames[1:])
    return Step(
        number,
        [change if isinstance(change, int) else _admission(change, prompts) for change in raw],
        [(id, token) for id, token in decodes],
        [(id, rows) for id, rows in chunks],
    )


def _admission(raw: list[Any], prompts: Any) -> Admission:
    id, home, kv_tokens, sampling, logits = raw
    logits = tuple(logits) if isinstance(logits, list) else logits
    return Admission(id, home, kv_tokens, Sampling(*sampling), logits, array("i", next(prompts)))


def encode_reply(reply: Reply) -> Frames:
    if isinstance(reply, Ready):
        return [json.dumps(["ready", reply.rank]).encode()]
    if isinstance(reply, Failed):
        fields = [reply.rank, reply.sentence, reply.exit_code, reply.trace]
        return [json.dumps(["failed", *fields]).encode()]
    ids = [id for id, _ in reply.logits]
    header = ["done", reply.number, reply.group, reply.tokens, ids, reply.busy_s]
    return [json.dumps(header).encode(), *(rows for _, rows in reply.logits)]


def decode_reply(frames: Frames) -> Reply:
    kind, *fields = json.loads(frames[0])
    if kind == "ready":
        return Ready(*fields)
    if kind == "failed":
        return Failed(*fields)
    number, group, tokens, ids, busy_s = fields
    logits = list(zip(ids, frames[1:], strict=True))
    return Done(number, group, [(id, token) for id, token in tokens], logits, busy_s)
