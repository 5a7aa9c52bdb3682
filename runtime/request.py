"""What a client hands in and gets back: `Request`, `Sampling`, and the `Handle` that yields tokens."""

from __future__ import annotations

import itertools
import math
import queue
import time
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Literal

from ..errors import BadInput, MnemocError
from ..units import format_duration

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "cancelled"]
Logits = Literal["none", "last", "all"] | tuple[int, ...]
Top = tuple[tuple[int, float], ...]
"""(id, logprob) of the likeliest tokens, in this order."""

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when they end.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; the same seed gives the same tokens.
    stop_ids: tokens that end the answer, beside the model's own end-of-sequence tokens;
        ignore_eos: let only `stop_ids` end it; min_tokens: so many come before any that ends it
    presence_penalty, frequency_penalty: taken from the logit of a token that has been generated, once, and
        for each time; repetition_penalty: above 1 it makes what is in prompt or answer less likely
    logit_bias: (id, what is added to its logit)
    logprobs: give with each token its logprob, and those of so many of the likeliest; None: none
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise BadInput("temperature must lie in 0..2", got=self.temperature)
        if not 0 < self.top_p <= 1:
            raise BadInput("top_p must lie in (0, 1]", got=self.top_p)
        if self.top_k < 0:
            raise BadInput("top_k must be 0 (off) or more", got=self.top_k)
        if not 0 <= self.min_p <= 1:
            raise BadInput("min_p must lie in 0..1", got=self.min_p)
        if self.min_tokens < 0:
            raise BadInput("min_tokens must be 0 or more", got=self.min_tokens)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise BadInput("seed must be an integer of 64 bits", got=self.seed)
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise BadInput(f"{name} must lie in -2..2", got=getattr(self, name))
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise BadInput("repetition_penalty must be above 0", got=self.repetition_penalty)
        for _, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise BadInput("a bias must lie in -100..100", where="logit_bias", got=bias)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise BadInput(f"logprobs must lie in 0..{MOST_LOGPROBS}", got=self.logprobs)


@dataclass(frozen=True)
class Promise:
    """When a request wants its tokens. None: as the plan promises, for a prompt of its length.

    ttft_s: to the first one, from submission; tbt_s: between two; priority: lower goes first, where the
        scheduling policy asks for it
    strict: refuse the request at once, with `TooLate`, if its first token is predicted to come too late
    """

    ttft_s: float | None = None
    tbt_s: float | None = None
    priority: int = 0
    strict: bool = False


@dataclass(frozen=True)
class Origin:
    """Who asks, for logs and traces: nothing of it changes the answer.

    id: what the client's side calls it; index: which of its answers this is; operation: what it asked for,
        of which model
    traceparent, tracestate: the trace that it belongs to (W3C Trace Context), where it named one
    """

    id: str = ""
    index: int = 0
    operation: str = "text_completion"
    model: str = ""
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and what to do with it.

    logits: "none"; "last" (of every token that is sampled from); "all" (of the prompt's rows too);
        or positions of the prompt whose logits are wanted beside the sampled ones.
    """

    prompt_ids: Sequence[int]
    max_tokens: int = 16
    sampling: Sampling = Sampling()
    logits: Logits = "none"
    promise: Promise = Promise()
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise BadInput("the prompt is empty", do="give at least one token")
        if self.max_tokens < 1:
            raise BadInput("max_tokens must be 1 or more", got=self.max_tokens)
        if self.sampling.min_tokens > self.max_tokens:
            raise BadInput(
                f"must be at most max_tokens, {self.max_tokens}",
                where="min_tokens",
                got=self.sampling.min_tokens,
            )

    def check_ids(self, vocab: int) -> None:
        """BadInput for a token id, in the prompt or the sampling, that is none of the model's."""
        sampling = self.sampling
        named: dict[str, Collection[int]] = {
            "prompt": self.prompt_ids,
            "stop_token_ids": sampling.stop_ids,
            "logit_bias": [id for id, _ in sampling.logit_bias],
        }
        for where, ids in named.items():
            check_ids(ids, vocab, where)
        if sampling.min_tokens and len(sampling.stop_ids) == vocab:
            raise BadInput(
                "no token is left that does not end the answer",
                where="min_tokens",
                do="name fewer stop_token_ids",
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens that will be cached at most: the last one generated never is."""
        return len(self.prompt_ids) + self.max_tokens - 1


@dataclass(frozen=True)
class Prepared:
    """A request whose every token the engine has looked at.

    hashes: of its prompt's pages, if it may share them
    """

    request: Request
    hashes: Sequence[bytes] | None


class TooLate(MnemocError):
    """A strict promise that cannot be kept now.

    predicted_s, promised_s: to the first token; retry_s: after which it could be kept, if nobody else came
    """

    def __init__(self, predicted_s: float, promised_s: float) -> None:
        self.predicted_s, self.promised_s = predicted_s, promised_s
        self.retry_s = predicted_s - promised_s
        self.figures = {
            "predicted_ttft_s": predicted_s,
            "promised_ttft_s": promised_s,
            "retry_after_s": self.retry_s,
        }
        super().__init__(
            f"the first token would come in {format_duration(predicted_s)}, and "
            f"{format_duration(promised_s)} is promised",
            do=f"try again in {format_duration(self.retry_s)}",
        )


def check_ids(ids: Collection[int], vocab: int, where: str) -> None:
    """BadInput for one that is none of the model's. In two calls, the quickest way through a million."""
    if ids:
        least, most = min(ids), max(ids)
        if least < 0 or most >= vocab:
            bad = least if least < 0 else most
            raise BadInput(f"token ids lie in 0..{vocab - 1}", where=where, got=bad)


@dataclass(frozen=True)
class Progress:
    """`done` of `total` prompt tokens are prefilled; eta_s: predicted seconds to the first token.

    state: "prefill", "queued" while it has no KV pages, "preempted", or "decode"
    """

    done: int
    total: int
    eta_s: float
    state: str = "prefill"


@dataclass(slots=True)  # not frozen: that makes it thrice as slow, and there are many
class Token:
    """One generated token. time_s: on time.monotonic's clock; finish: why it is the last, if it is.

    logprob: log of its probability, before temperature, penalties and cuts, where asked for;
    top_logprobs: of the likeliest tokens then
    """

    id: int
    index: int
    time_s: float
    finish: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: Top = ()


@dataclass(frozen=True)
class Ended:
    """No more events: cancelled (error is None) or failed."""

    error: MnemocError | None = None


Event = Progress | Token | Ended
Sink = Callable[[Event], None]


@dataclass(eq=False)
class Handle:
    """A submitted request: iterate it for tokens (`for token in handle`), or `events()` for progress too.

    Iteration raises the error that ended the request, if one did. With a `sink` there is nothing to
    iterate. Times are seconds on time.monotonic's clock; logprobs are those of the tokens, where asked for;
    hashes: of the prompt's pages, if it may share them; ends: tokens that end the answer; cached_tokens: of
    the prompt, found in pages when it came;
    predicted_ttft_s: as predicted when the engine took it on; hand_over: gives an event to whoever waits.
    """

    request: Request
    id: int
    submitted_s: float
    on_cancel: Callable[[int], object]
    sink: InitVar[Sink | None]
    vocab: int
    hashes: Sequence[bytes] | None = None
    ends: Set[int] = frozenset()
    token_times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, Top]] = field(default_factory=list)
    logits_bytes: dict[int, bytes] = field(default_factory=dict)
    scheduled_s: float | None = None
    predicted_ttft_s: float | None = None
    cached_tokens: int = 0
    progress: Progress | None = None
    finish_reason: FinishReason | None = None
    error: MnemocError | None = None
    _events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    _read_to_end: bool = False
    hand_over: Sink = field(init=False)

    def __post_init__(self, sink: Sink | None) -> None:
        self.hand_over = sink or self._events.put

    def __iter__(self) -> Iterator[Token]:
        return (event for event in self.events() if isinstance(event, Token))

    def events(self) -> Iterator[Progress | Token]:
        """Prefill progress and tokens as they come, until the request ends."""
        while not self._read_to_end:
            event = self._events.get()
            self._read_to_end = isinstance(event, Ended) or (
                isinstance(event, Token) and event.finish is not None
            )
            if not isinstance(event, Ended):
                yield event
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Stop it and free its pages at once. Harmless when it is over."""
        self.on_cancel(self.id)

    def stop(self) -> None:
        """As `cancel`, by somebody who has what was asked for: a stop string was found."""
        self.finish_reason = self.finish_reason or "stop"
        self.on_cancel(self.id)

    def result(self) -> Handle:
        """Wait for the end; returns itself, for its `tokens`, `logits` and times."""
        for _ in self.events():
            pass
        return self

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The rows that were asked for, [rows, vocab], in the order of their positions."""
        import numpy as np

        # of two groups that compute neighbouring rows, the later ones' may be heard of first
        data = b"".join(self.logits_bytes[position] for position in sorted(self.logits_bytes))
        return np.frombuffer(data, dtype=np.float32).reshape(-1, self.vocab)

    @property
    def ttft_s(self) -> float | None:
        """Measured time to first token."""
        return self.token_times_s[0] - self.submitted_s if self.token_times_s else None

    @property
    def tbt_s(self) -> list[float]:
        """Measured times between tokens."""
        return [after - before for before, after in itertools.pairwise(self.token_times_s)]

    def record(self, event: Progress | Ended) -> None:
        """Engine's side: what the event changes here."""
        if isinstance(event, Progress):
            self.progress = event
        else:
            self.error = event.error
            self.finish_reason = self.finish_reason or "cancelled"


def now_s() -> float:
    """The engine's clock."""
    return time.monotonic()
