"""What the scheduler knows of requests, and the micro-batches it makes of them: lengths and times, no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cost import Load
from .protocol import Copies, MorePages, Run


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it. Counts in tokens, times in seconds on the engine's clock.

    id: the request's, for good; sid: of its present admission, −1 while it waits
    prompt: to be prefilled: after a preemption, with what was generated until then (`generated`)
    max_new: generated at most, over all admissions
    work_s: predicted time to prefill the prompt alone; deadline_s: when its first token is due; tbt_s: its
        promise between tokens
    issued: prompt tokens handed to stage 0; processed: those that have left the last stage;
    cached: tokens whose K/V is stored once everything issued is through
    hashes: of the prompt's pages, each with all before it (see `prefix`); empty: nothing is shared
    """

    id: int
    prompt: int
    max_new: int
    arrival_s: float
    work_s: float
    deadline_s: float
    tbt_s: float
    priority: int = 0
    hashes: Sequence[object] = ()
    sid: int = -1
    home: int = 0
    generated: int = 0
    issued: int = 0
    processed: int = 0
    cached: int = 0
    preemptions: int = 0
    started_s: float | None = None
    first_token_s: float | None = None

    @property
    def kv_tokens(self) -> int:
        """Cached at most: the last token generated never is."""
        return self.prompt - self.generated + self.max_new - 1


@dataclass(frozen=True)
class Chunk:
    """`rows` prompt tokens of an admission, after `start` cached ones; `ends`: the prompt's last."""

    sid: int
    start: int
    rows: int
    ends: bool


@dataclass(frozen=True)
class Admitted:
    """A job begins, with `cached` tokens in its pages. pages: by KVP group."""

    job: Job
    sid: int
    cached: int
    pages: tuple[tuple[Run, ...], ...]


Change = Admitted | MorePages | Copies | int
"""An int: the sid of an admission that is over."""


@dataclass(frozen=True)
class MicroBatch:
    """What one step computes. decodes: sids; loads: of each KVP group that has rows in it."""

    decodes: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    loads: Mapping[int, Load]
    changes: tuple[Change, ...]

    @property
    def groups(self) -> frozenset[int]:
        return frozenset(self.loads)

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(chunk.rows for chunk in self.chunks)
