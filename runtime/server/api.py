"""The bodies that clients send, and what they become: prompts and engine requests.

Fields that would change the answer and are not served are refused by name, unless they hold their
neutral value; fields that are only remarks are let pass; unknown ones are refused, as OpenAI does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import BadInput
from ..request import MOST_LOGPROBS, Promise, Request, Sampling
from ..tokenizer import Tokenizer

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
REMARKS = frozenset({"metadata", "request_id", "service_tier", "store", "user"})
DEFAULT_COMPLETION_TOKENS = 16

TokenId = Annotated[int, Field(strict=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(strict=True, ge=0, le=MOST_LOGPROBS)]


class StreamOptions(BaseModel):
    """include_usage: one more event at the end, with the counts."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of request share. null counts as not given."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = Field(default_factory=list, max_length=16)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    logit_bias: dict[int, Bias] = Field(default_factory=dict)
    priority: int = 0
    ttft_slo_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    tbt_slo_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {key: value for key, value in data.items() if value is not None}
        return {
            key: value
            for key, value in kept.items()
            if key not in REMARKS and value not in NEUTRAL.get(key, ())
        }

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(text for text in given if text)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        """As `Sampling.logprobs`."""
        raise NotImplementedError

    def requests(
        self, prompts: list[tuple[int, ...]], max_tokens: int, strict: bool = False
    ) -> list[Request]:
        """`n` requests for each prompt, prompt by prompt. With a seed, each has its own.

        strict: as in `Promise`
        """
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
            seeds = (self.seed + i for i in range(self.n))
            samplings = [dataclasses.replace(sampling, seed=seed) for seed in seeds]
        return [
            Request(ids, max_tokens, sampling, promise=promise)
            for ids in prompts
            for sampling in samplings
        ]


class CompletionBody(Body):
    """POST /v1/completions. A prompt is a text or token ids; several are a list of either."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    logprobs: Count | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [encode(self.prompt, tokenizer)]
        if all(isinstance(item, int) for item in self.prompt):
            return [tuple(self.prompt)]  # type: ignore[arg-type]
        return [
            encode(item, tokenizer) if isinstance(item, str) else tuple(item)  # type: ignore[arg-type]
            for item in self.prompt
        ]

    def limit(self, default: int) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


class TextPart(BaseModel):
    """A piece of a message; only text is served."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Count = 0

    @model_validator(mode="after")
    def _likeliest_tokens_come_with_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
        return [encode(chat_text(self.messages), tokenizer)]

    def limit(self, default: int) -> int:
        return self.max_completion_tokens or self.max_tokens or default


def chat_text(messages: list[Message]) -> str:
    """A conversation as text: a line "role: content" for each turn, then "assistant:" to go on from.

    A plain form that every model can read. It is not the model's own chat template: those are jinja2
    programs, which the run time does not load.
    """
    turns = [f"{message.role}: {message.text}\n" for message in messages]
    return "".join(turns) + "assistant:"


def encode(text: str, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if tokenizer is None:
        raise BadInput("the model has no tokenizer.json", where="prompt", do="send token ids")
    return tokenizer.encode(text)
