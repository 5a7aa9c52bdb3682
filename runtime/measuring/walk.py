"""What a replay runs: micro-batches as one rank sees them, and what cost.py says of each. No torch.

Each is a chunk of one prompt after what is cached of it, or a decode of several requests behind their
prompts. Without more said, they are some of the plan's own chunks, evenly along the prompt, and a decode.
Requests are at home where this rank sees most of them: on its own KVP group, unless they spread to all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ...artifact import Manifest, Plan
from ...errors import UsageError
from ...units import format_count
from ..scheduling.cost import Load
from ..scheduling.growth import Growth

MESSAGES = "communication"
"""The part of a prediction that is between ranks."""


@dataclass(frozen=True)
class Asked:
    """What to replay.

    weights: a model directory; None: random ones, from `seed`
    prompt: tokens of a request; None: all that the plan is for, or up to the end of the one chunk
    cached: only the chunk after so many of them; None: up to `steps` chunks along the prompt
    chunk: rows of a chunk; None: as the plan says
    decodes: requests that decode together behind the prompt; 0: none
    pages: KV pages of each layer; None: as many as that takes
    """

    rank: int
    weights: Path | None = None
    prompt: int | None = None
    cached: int | None = None
    chunk: int | None = None
    decodes: int = 1
    steps: int = 16
    pages: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """kind: "prefill": `rows` of a prompt after `cached` tokens; "decode": one of each of `rows` requests."""

    kind: str
    rows: int
    cached: int


@dataclass(frozen=True)
class Walk:
    """prompt: tokens of each request; home: its first KVP group; pages: KV pages of each layer."""

    cost: ModuleType
    growth: Growth
    stage: int
    shard: int
    prompt: int
    home: int
    pages: int
    micro_batches: tuple[MicroBatch, ...]

    @classmethod
    def of(cls, manifest: Manifest, cost: ModuleType, asked: Asked) -> Walk:
        """UsageError for what the plan or its rank cannot do."""
        plan, growth = manifest.plan, Growth.of(manifest.plan)
        if not 0 <= asked.rank < plan.gpus:
            raise UsageError(
                f"the plan ({plan.layout}) has no such rank",
                where="--rank",
                got=asked.rank,
                do=f"give one of 0 to {plan.gpus - 1}",
            )
        stage, group, _ = plan.layout.coordinates(asked.rank)
        prompt = _prompt(plan, manifest.workload.context, asked)
        home = 0 if growth.shards(prompt) == growth.kvp else group
        shard = growth.shard(home, group)
        chunks = [
            MicroBatch("prefill", rows, cached)
            for cached, rows in _chunks(plan, prompt, asked)
            if shard < growth.seen_by(cached + rows)
        ]
        if asked.cached is not None and not chunks:
            raise UsageError(
                f"KVP group {group} does no work for that chunk: a request comes to it after "
                f"{shard * plan.stripe_tokens:,} tokens",
                where="--cached",
                got=asked.cached,
                do="give more, or a rank of group 0",
            )
        decodes = [MicroBatch("decode", asked.decodes, prompt)] if asked.decodes else []
        pages = _pages(plan, growth.held(shard, prompt + 1), asked)
        batches = (*_spread(chunks, asked.steps), *decodes)
        return cls(cost, growth, stage, shard, prompt, home, pages, batches)

    def load(self, batch: MicroBatch) -> Load:
        """What cost.py is asked with: the micro-batch on this rank's shard."""
        load = Load()
        if batch.kind == "decode":
            for _ in range(batch.rows):
                load.add_decode(self.growth, self.shard, batch.cached)
        else:
            ends = batch.cached + batch.rows == self.prompt
            load.add_chunk(self.growth, self.shard, batch.cached, batch.rows, ends)
        return load

    def predict(self, batch: MicroBatch) -> tuple[float, float]:
        """The plan's seconds for it in this rank's stage: without messages, and of these."""
        load = self.load(batch)
        counts = (load.T, load.R, load.QK, load.KV, load.KD, load.X)
        seconds = self.cost.stage_parts_s(self.stage, *counts)
        parts = dict(zip(self.cost.PARTS, seconds, strict=True))
        messages_s = parts.pop(MESSAGES, 0.0)
        return sum(parts.values()), messages_s


def _prompt(plan: Plan, context: int, asked: Asked) -> int:
    """Tokens of the prompt, if the plan can serve it as asked."""
    prompt = asked.prompt
    if prompt is None:
        prompt = context
        if asked.cached is not None:
            prompt = asked.cached + (asked.chunk or plan.chunk_at(asked.cached))
    limits = (
        ("--prompt", prompt, context, "tokens of context"),
        ("--cached", asked.cached or 0, prompt - 1, "tokens before the prompt's last"),
        ("--decodes", asked.decodes, plan.max_batch, "requests that decode together"),
    )
    for option, value, limit, what in limits:
        if value > limit:
            raise UsageError(
                f"there are at most {format_count(limit)} {what}", where=option, got=value
            )
    return prompt


def _chunks(plan: Plan, prompt: int, asked: Asked) -> Iterator[tuple[int, int]]:
    """(cached, rows) of the chunks that may be run."""
    cached = asked.cached or 0
    while cached < prompt:
        rows = min(asked.chunk or plan.chunk_at(cached), prompt - cached)
        yield cached, rows
        if asked.cached is not None:
            return
        cached += rows


def _spread(chunks: list[MicroBatch], count: int) -> list[MicroBatch]:
    """At most `count` of them, evenly, the first and the last among them."""
    if len(chunks) <= count:
        return chunks
    last = len(chunks) - 1
    return [chunks[i * last // max(1, count - 1)] for i in range(count)]


def _pages(plan: Plan, tokens: int, asked: Asked) -> int:
    """KV pages of each layer: those asked for, or as many as the requests' shards need."""
    needed = max(1, asked.decodes) * max(1, -(-tokens // plan.page_size))
    if asked.pages is not None and asked.pages < needed:
        raise UsageError(
            f"this takes {needed:,} KV pages of {plan.page_size} tokens",
            where="--pages",
            got=asked.pages,
        )
    return asked.pages or needed
