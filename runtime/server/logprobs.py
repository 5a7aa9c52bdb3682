"""Tokens of an answer with their probabilities, as OpenAI's objects: an entry for each that was generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..request import Token
from ..tokenizer import Tokenizer

LEAST = -9999.0
"""In place of minus infinity, which JSON has not."""


@dataclass(frozen=True)
class Likely:
    """A token that might have come, or has."""

    text: str
    bytes: bytes
    logprob: float

    @classmethod
    def of(cls, id: int, logprob: float, tokenizer: Tokenizer | None) -> Likely:
        if tokenizer is None:
            text = f"token_id:{id}"
            return cls(text, text.encode(), max(logprob, LEAST))
        return cls(tokenizer.token(id), tokenizer.token_bytes(id), max(logprob, LEAST))


@dataclass(frozen=True)
class Scored:
    """A token of an answer. top: the likeliest ones; offset: where in the answer's text it begins."""

    token: Likely
    top: tuple[Likely, ...]
    offset: int

    @classmethod
    def of(cls, token: Token, offset: int, tokenizer: Tokenizer | None) -> Scored | None:
        """None where no logprobs were asked for."""
        if token.logprob is None:
            return None
        own = Likely.of(token.id, token.logprob, tokenizer)
        top = tuple(Likely.of(id, logprob, tokenizer) for id, logprob in token.top_logprobs)
        return cls(own, top, offset)


def completion_logprobs(scored: Sequence[Scored]) -> Any:
    """Of a text_completion. The token that came is among the likeliest, even if it was not."""
    return {
        "tokens": [one.token.text for one in scored],
        "token_logprobs": [one.token.logprob for one in scored],
        "top_logprobs": [_by_text((one.token, *one.top)) for one in scored],
        "text_offset": [one.offset for one in scored],
    }


def _by_text(likely: Sequence[Likely]) -> dict[str, float]:
    """Parts of characters all look alike: the first of them counts."""
    return {one.text: one.logprob for one in reversed(likely)}


def chat_logprobs(scored: Sequence[Scored]) -> Any:
    """Of a chat.completion."""
    content = [
        {**_chat_token(one.token), "top_logprobs": [_chat_token(likely) for likely in one.top]}
        for one in scored
    ]
    return {"content": content, "refusal": None}


def _chat_token(likely: Likely) -> dict[str, Any]:
    return {"token": likely.text, "logprob": likely.logprob, "bytes": list(likely.bytes)}
