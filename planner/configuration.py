"""A configuration that the user pins, and what is asked of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from ..artifact import AUTO, Precision, Workload
from ..errors import BadInput, UsageError
from ..ir.model import ModelSpec
from ..layout import Layout
from .chunks import Riders
from .cluster import Cluster
from .cost import links_of
from .precision import check_precision
from .space import (
    Growth,
    check_all_reduce,
    check_overlap,
    check_stripe,
    growths,
    layouts,
    page_size,
)

RINGS = ("striped", "contiguous")


@dataclass(frozen=True)
class Configuration:
    """A configuration and what is asked of it. Counts in tokens; chunk None: as a plan would choose.

    prompt: tokens to prefill; cached: tokens before them whose KV is there; cp: ranks of ring attention;
    ring: how the prompt lies on them, one of RINGS (see `forecast`)
    stripe: of KVP growth, in tokens, or "contiguous" (see `space`); None: as a plan would choose
    overlap: rows from which chunks go through layers in halves, or "off"; None: as a plan would choose
    all_reduce: "nccl", or None: for few rows one shot, as a plan would choose
    eager: kernels launched one by one, not by CUDA graphs
    """

    layout: Layout
    prompt: int
    cached: int = 0
    output: int = 256
    concurrency: int = 1
    chunk: int | None = None
    cp: int = 1
    ring: str = "striped"
    precision: Precision = AUTO
    stripe: int | str | None = None
    overlap: int | str | None = None
    all_reduce: str | None = None
    eager: bool = False

    @property
    def tokens(self) -> int:
        return self.cached + self.prompt

    @property
    def ranks(self) -> int:
        return self.layout.gpus * self.cp


def check_configuration(spec: ModelSpec, cluster: Cluster, asked: Configuration) -> None:
    for name in ("prompt", "output", "concurrency", "cp"):
        if getattr(asked, name) < 1:
            raise BadInput(f"{name} must be at least 1", got=getattr(asked, name))
    if asked.cached < 0 or (asked.chunk is not None and asked.chunk < 1):
        raise BadInput("cached and chunk may not be negative", got=(asked.cached, asked.chunk))
    layout = asked.layout
    if asked.cp > 1 and (layout.spp > 1 or layout.kvp > 1):
        raise UsageError(
            "--cp takes the place of spp and kvp", got=str(layout), do="give tp alone with --cp"
        )
    if asked.ring not in RINGS:
        raise UsageError("unknown ring", got=asked.ring, do=f"one of {', '.join(RINGS)}")
    if asked.cp > 1 and asked.chunk is not None:
        raise UsageError("--cp prefills in one pass", do="leave --chunk out")
    check_precision(cluster, asked.precision)
    if asked.stripe is not None:
        check_stripe(asked.stripe, layout.kvp)
    if asked.all_reduce is not None:
        check_all_reduce(asked.all_reduce)
    if asked.overlap is not None:
        check_overlap(asked.overlap, layout.kvp)
    layouts(spec, cluster, cluster.devices, dataclasses.asdict(layout))
    if asked.ranks > cluster.devices:
        raise BadInput(
            f"tp={layout.tp} × cp={asked.cp} needs {asked.ranks} devices",
            where=cluster.name,
            got=f"{cluster.devices} devices",
            do="lower --cp, or give a cluster file with more nodes",
        )


def growths_of(asked: Configuration) -> tuple[Growth, ...]:
    """How each request may spread over all groups: as it is pinned, or every way that a plan would weigh."""
    layout, workload = asked.layout, _workload(asked)
    pins = {} if asked.stripe is None else {"stripe": asked.stripe}
    ways = [
        dataclasses.replace(growth, concurrency=asked.concurrency)
        for growth in growths(layout, workload, pins)
    ]
    return tuple(ways) or (contiguous(asked, layout.kvp),)


def contiguous(asked: Configuration, groups: int) -> Growth:
    """Every request cut over so many groups, one run of tokens on each."""
    size, total = page_size(_workload(asked)), asked.tokens + asked.output
    stripe = math.ceil(total / groups / size) * size
    return Growth(groups, stripe, total, size, asked.concurrency, asked.layout.helix)


def riders_of(asked: Configuration, growth: Growth) -> Riders:
    """The decodes as the busiest group sees them, half way through their output."""
    length = np.array(float(asked.tokens + asked.output // 2))
    spread = growth.spread
    return Riders(asked.concurrency, int(spread.held(length)), int(spread.computing(length)))


def _workload(asked: Configuration) -> Workload:
    return Workload(asked.tokens, math.inf, math.inf, asked.output)


def slowest_link(asked: Configuration, cluster: Cluster) -> str:
    """The key of the slowest link that the layout crosses."""
    groups = asked.layout.kvp * asked.cp
    links = links_of(dataclasses.replace(asked.layout, kvp=groups), cluster)
    crossed = {links.kvp if groups > 1 else "intra", links.spp}
    return f"links.{'inter' if 'inter' in crossed else 'intra'}.bandwidth"
