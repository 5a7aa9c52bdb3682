"""A conversation becomes the text that a model reads: by its own chat template, or plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Turn = Mapping[str, str]
"""role, content and, where given, name."""


@dataclass(frozen=True)
class Conversation:
    """What a template is told.

    go_on: end with the beginning of the assistant's turn; more: variables of this template's own
    """

    turns: Sequence[Turn]
    go_on: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)


Template = Callable[[Conversation], str]
"""Raises BadInput for a conversation that it does not take. Called in any thread."""


def plainly(talk: Conversation) -> str:
    """A line "role: content" for each turn, then "assistant:": a form that any model can read."""
    lines = [f"{turn['role']}: {turn['content']}\n" for turn in talk.turns]
    return "".join(lines) + ("assistant:" if talk.go_on else "")
