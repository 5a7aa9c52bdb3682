"""A configuration that the user pins, and what is asked of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..artifact import Layout, Workload
from ..errors import BadInput, UsageError
from ..ir.model import ModelSpec
from .chunks import Riders
from .cluster import Cluster
from .cost import links_of
from .space import Growth, check_pins, page_size


@dataclass(frozen=True)
class Question:
    """A configuration and what is asked of it. Counts in tokens; chunk None: as a plan would choose.

    prompt: tokens to prefill; cached: tokens before them whose KV is there; cp: ranks of ring attention
    """

    layout: Layout
    prompt: int
    cached: int = 0
    output: int = 256
    concurrency: int = 1
    chunk: int | None = None
    cp: int = 1

    @property
    def tokens(self) -> int:
        return self.cached + self.prompt

    @property
    def ranks(self) -> int:
        return self.layout.gpus * self.cp


def check_question(spec: ModelSpec, cluster: Cluster, question: Question) -> None:
    for name in ("prompt", "output", "concurrency", "cp"):
        if getattr(question, name) < 1:
            raise BadInput(f"{name} must be at least 1", got=getattr(question, name))
    if question.cached < 0 or (question.chunk is not None and question.chunk < 1):
        raise BadInput(
            "cached and chunk may not be negative", got=(question.cached, question.chunk)
        )
    layout = question.layout
    if question.cp > 1 and (layout.spp > 1 or layout.kvp > 1):
        raise UsageError(
            "--cp takes the place of spp and kvp", got=str(layout), do="give tp alone with --cp"
        )
    if question.cp > 1 and question.chunk is not None:
        raise UsageError("--cp prefills in one pass", do="leave --chunk out")
    check_pins(
        spec, cluster, cluster.devices, {"tp": layout.tp, "spp": layout.spp, "kvp": layout.kvp}
    )
    if question.ranks > cluster.devices:
        raise BadInput(
            f"tp={layout.tp} × cp={question.cp} needs {question.ranks} devices",
            where=cluster.name,
            got=f"{cluster.devices} devices",
            do="lower --cp, or give a cluster file with more nodes",
        )


def growth_of(question: Question, groups: int) -> Growth:
    """Every request spreads over all groups."""
    size = page_size(Workload(question.tokens, math.inf, math.inf, question.output))
    total = question.tokens + question.output
    tokens = math.ceil(total / groups / size) * size
    return Growth(groups, groups, tokens, size, question.concurrency)


def riders_of(question: Question, groups: int) -> Riders:
    """The decodes as the busiest group sees them, half way through their output."""
    shard, length = growth_of(question, groups).tokens, question.tokens + question.output // 2
    return Riders(question.concurrency, min(shard, length), math.ceil(length / shard))


def slowest_link(question: Question, cluster: Cluster) -> str:
    """The key of the slowest link that the layout crosses."""
    groups = question.layout.kvp * question.cp
    links = links_of(Layout(question.layout.tp, question.layout.spp, groups), cluster)
    crossed = {links.kvp if groups > 1 else "intra", links.spp}
    return f"links.{'inter' if 'inter' in crossed else 'intra'}.bandwidth"
