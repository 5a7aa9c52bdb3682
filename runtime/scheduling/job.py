"""What the scheduler knows of requests, and the micro-batches it makes of them: no tokens, only counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..protocol.messages import Copies, MorePages, Run
from .cost import Load
from .pipeline import Expected


@dataclass(eq=False, slots=True)
class Job:
    """A request as the scheduler sees it. Counts in tokens, times in seconds on the engine's clock.

    id: the request's, for good; sid: of its present admission, −1 while it waits
    prompt: to be prefilled: after a preemption, with what was generated until then (`generated`)
    kv_tokens: cached at most, over its whole life
    work_s: predicted time to prefill the prompt that came; whole_s: the prompt as it is now; left_s: what of
        that is left; long: whether it is much
    deadline_s: from arrival, when its first token is due; tbt_s: its promise between tokens
    hashes: of its tokens' pages (`prefix`), of generated ones as they fill; None: it shares nothing
    issued: prompt tokens handed to stage 0; processed: those that have left the last stage
    cached: tokens whose K/V is stored once everything issued is through; covered: what it has pages for
    tokens: generated so far; first_token_s: when the first of them came; due_s: when the next is due, were
        it to have one every `tbt_s` from the first on; −∞ before that
    lent: for how many of its tokens it waited longer than promised, for the sake of a late prompt; late: how
        many came behind their promise
    preemptions: how often it lost its pages, to another request or with the workers; started_s: when it last
        got any
    """

    id: int
    prompt: int
    kv_tokens: int
    arrival_s: float
    work_s: float
    left_s: float
    deadline_s: float
    tbt_s: float
    priority: int
    long: bool
    hashes: list[bytes] | None
    whole_s: float = 0.0
    sid: int = -1
    home: int = 0
    generated: int = 0
    issued: int = 0
    processed: int = 0
    cached: int = 0
    covered: int = 0
    tokens: int = 0
    lent: int = 0
    late: int = 0
    preemptions: int = 0
    started_s: float | None = None
    first_token_s: float | None = None
    due_s: float = -math.inf

    @property
    def computed(self) -> int:
        """Tokens, of prompt and answer, that have been through the last stage."""
        new = self.tokens - self.generated
        return self.prompt + new - 1 if new else self.processed

    def slack_s(self, now_s: float) -> float:
        """How long the prompt could still stand idle and be in time."""
        return self.arrival_s + self.deadline_s - now_s - self.left_s

    def relative_slack(self, now_s: float) -> float:
        """Slack as a share of all of the prompt's work."""
        return self.slack_s(now_s) / self.work_s

    def begin(self, now_s: float) -> None:
        """Its first token came."""
        self.first_token_s = now_s
        self.due_s = now_s + self.tbt_s

    def eta_s(self, left_s: float, now_s: float) -> float:
        """The plan's estimate of what is left of the prompt, corrected by the pace so far."""
        predicted_s = self.whole_s - left_s
        pace = 1.0
        if self.started_s is not None and predicted_s > 0:
            pace = (now_s - self.started_s) / predicted_s
        return left_s * pace

    def in_time(self, now_s: float) -> bool:
        """Whether its first token came when it was due, or is not due yet."""
        first_s = now_s if self.first_token_s is None else self.first_token_s
        return first_s - self.arrival_s <= self.deadline_s


class Chunk(NamedTuple):
    """`rows` prompt tokens of an admission, after `start` cached ones; `ends`: the prompt's last.

    left_s: predicted time for what then is left of the prompt
    """

    sid: int
    start: int
    rows: int
    ends: bool
    left_s: float = 0.0


@dataclass(frozen=True)
class Admitted:
    """A job begins. What is said here is as it was then; pages: by KVP group."""

    job: Job
    sid: int
    home: int
    generated: int
    cached: int
    pages: tuple[tuple[Run, ...], ...]


Change = Admitted | MorePages | Copies | int
"""An int: the sid of an admission that is over."""


class MicroBatch(NamedTuple):
    """What one step computes. decodes: sids; loads: of each KVP group that has rows in it; expected: how long
    that will take."""

    decodes: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    loads: Mapping[int, Load]
    changes: tuple[Change, ...]
    expected: Expected = Expected()
