"""What every route of the server stands on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..engine import Engine
from ..tokenizer import Tokenizer
from .following import Following
from .mailbox import Mailbox
from .metrics import Metrics
from .options import Options


@dataclass(frozen=True)
class Service:
    """A running engine and how it is served. Without a tokenizer prompts are token ids.

    model: its name in requests and answers; started_s: Unix time
    """

    engine: Engine
    tokenizer: Tokenizer | None
    options: Options
    model: str
    metrics: Metrics
    following: Following
    mailbox: Mailbox = field(default_factory=Mailbox)
    started_s: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def over(cls, engine: Engine, tokenizer: Tokenizer | None, options: Options) -> Service:
        model = str(engine.manifest.model["name"])
        following = Following(engine, options.news_every_s)
        return cls(engine, tokenizer, options, model, Metrics(engine, model), following)
