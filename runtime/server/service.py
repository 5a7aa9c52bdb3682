"""What every route of the server stands on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..engine import Engine
from ..telemetry.machine import Machine
from ..tokenizer import Tokenizer
from .conversation import Template
from .following import Following
from .mailbox import Mailbox
from .metrics import Metrics
from .options import Options
from .problems import Problem
from .recent import Recent


@dataclass
class Load:
    """in_flight: completions, whole or streamed, that have begun and not ended."""

    in_flight: int = 0


@dataclass(frozen=True)
class Service:
    """A running engine and how it is served. Without a tokenizer prompts are token ids.

    template: the model's own for conversations, if it has one
    model: its name in requests and answers; recent: what the last minutes were like; started_s: Unix time
    """

    engine: Engine
    tokenizer: Tokenizer | None
    template: Template | None
    options: Options
    model: str
    metrics: Metrics
    recent: Recent
    following: Following
    mailbox: Mailbox = field(default_factory=Mailbox)
    load: Load = field(default_factory=Load)
    started_s: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def over(
        cls,
        engine: Engine,
        tokenizer: Tokenizer | None,
        options: Options,
        template: Template | None,
    ) -> Service:
        model = str(engine.manifest.model["name"])
        recent = Recent(engine.stats, Machine.of(engine.manifest))
        metrics = Metrics(engine, model, recent)
        following = Following(engine, options.news_every_s)
        return cls(engine, tokenizer, template, options, model, metrics, recent, following)

    @property
    def context(self) -> int:
        """The longest prompt, in tokens."""
        return self.engine.manifest.workload.context

    @property
    def most_body_bytes(self) -> int:
        return self.options.limits.most_body_bytes(self.context)

    def check_model(self, asked: str | None) -> None:
        """Raises Problem if another model is asked for."""
        if asked not in (None, self.model):
            text = f"the model {asked!r} is not served here; it is {self.model!r}"
            raise Problem(404, text, "model", "model_not_found")
