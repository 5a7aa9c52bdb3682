"""The bodies that clients send, and what they become: prompts and engine requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from ...errors import BadInput
from ..request import Promise, Request, Sampling
from ..tokenizer import Tokenizer
from .conversation import Conversation, Template, Turn, plainly
from .fields import (
    INT32,
    NEUTRAL,
    REMARKS,
    AnyPrompt,
    Biases,
    Fields,
    Ids,
    Logprobs,
    Small,
    Stops,
    TokenIds,
)

DEFAULT_COMPLETION_TOKENS = 16
MOST_ANSWERS = 1024
"""Of one request: its prompts times n."""


class StreamOptions(Fields):
    """include_usage: one more event at the end, with the counts; continuous_usage_stats: in each event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(Fields):
    """What both kinds of request share."""

    neutral = NEUTRAL
    remarks = REMARKS

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=INT32)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Stops = Field(default_factory=list)
    stop_token_ids: TokenIds = ()
    ignore_eos: bool = False
    min_tokens: Small = 0
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.001, le=1000)
    logit_bias: Biases = Field(default_factory=dict)
    priority: int = Field(0, ge=-INT32, lt=INT32)
    ttft_slo_s: float | None = Field(None, ge=1e-6, le=1e6)
    tbt_slo_s: float | None = Field(None, ge=1e-6, le=1e6)
    n: int = Field(1, ge=1, le=128)
    best_of: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, lt=INT32)
    stream: bool = False
    stream_options: StreamOptions | None = None
    request_id: str | None = Field(None, pattern=r"^[!-~]{1,128}$")

    @model_validator(mode="after")
    def _fields_go_together(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not served, other than equal to n")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(text for text in given if text)

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    @property
    def num_logprobs(self) -> int | None:
        """As `Sampling.logprobs`."""
        raise NotImplementedError

    def requests(
        self, prompts: Sequence[Ids], max_tokens: int, strict: bool = False
    ) -> list[Request]:
        """`n` requests for each prompt, prompt by prompt. With a seed, each has its own.

        strict: as in `Promise`
        """
        if len(prompts) * self.n > MOST_ANSWERS:
            raise BadInput(
                f"one request gets at most {MOST_ANSWERS} answers, and this one asks for "
                f"{len(prompts)} prompts times {self.n}",
                do="send several requests",
            )
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=self.seed,
            stop_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            logprobs=self.num_logprobs,
        )
        promise = Promise(self.ttft_slo_s, self.tbt_slo_s, self.priority, strict)
        samplings = [sampling] * self.n
        if self.seed is not None:
            samplings = [
                dataclasses.replace(sampling, seed=_wrapped(self.seed + i)) for i in range(self.n)
            ]
        return [
            Request(ids, max_tokens, sampling, promise=promise)
            for ids in prompts
            for sampling in samplings
        ]


def _wrapped(seed: int) -> int:
    """Into 64 bits, behind whose end they begin anew."""
    return (seed + 2**63) % 2**64 - 2**63


class CompletionBody(Body):
    """POST /v1/completions. A prompt is a text or token ids; several are a list of either."""

    prompt: AnyPrompt
    add_special_tokens: bool = True
    logprobs: Logprobs | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self, tokenizer: Tokenizer | None, template: Template | None = None) -> list[Ids]:
        several = isinstance(self.prompt, list)
        given: Sequence[str | Ids] = self.prompt if several else [self.prompt]  # type: ignore[list-item, assignment]
        return [
            encode(item, tokenizer, special=self.add_special_tokens)
            if isinstance(item, str)
            else item
            for item in given
        ]

    def limit(self, default: int) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


class TextPart(Fields):
    """A piece of a message; only text is served."""

    type: Literal["text"]
    text: str


class Message(Fields):
    """One turn of a conversation."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {"annotations": ([],), "tool_calls": ([],)}
    """As clients send our own answers back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def turn(self) -> Turn:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class Talk(Fields):
    """A conversation, and what its template is told beside it."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)

    def text(self, template: Template | None) -> str:
        """What the model reads: in its own template's words, or plainly where it has none."""
        turns = [message.turn for message in self.messages]
        talk = Conversation(turns, self.add_generation_prompt, self.chat_template_kwargs)
        return (template or plainly)(talk)


class ChatBody(Talk, Body):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, lt=INT32)
    add_special_tokens: bool = False
    logprobs: bool = False
    top_logprobs: Logprobs = 0

    @model_validator(mode="after")
    def _likeliest_tokens_come_with_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self, tokenizer: Tokenizer | None, template: Template | None = None) -> list[Ids]:
        special = self.add_special_tokens or template is None  # a template writes its own
        return [encode(self.text(template), tokenizer, special=special)]

    def limit(self, default: int) -> int:
        return self.max_completion_tokens or self.max_tokens or default


class TokenizeText(Fields):
    """POST /tokenize, of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeTalk(Talk):
    """POST /tokenize, of a conversation."""

    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False


class DetokenizeBody(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


def encode(text: str, tokenizer: Tokenizer | None, *, special: bool) -> Ids:
    if tokenizer is None:
        raise BadInput("the model has no tokenizer.json", where="prompt", do="send token ids")
    return tokenizer.encode(text, special=special)


def read_tokenize(value: Any) -> TokenizeText | TokenizeTalk:
    talk = isinstance(value, dict) and value.get("messages") is not None
    return (TokenizeTalk if talk else TokenizeText).model_validate(value)
