"""What else could be had, and at what price: answers beside the plan that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import Layout


@dataclass(frozen=True)
class Alternative:
    """Another layout, with what it would give; `reason` says why it was not chosen."""

    layout: Layout
    gpus: int
    ttft_s: float
    tbt_s: float
    reason: str


@dataclass(frozen=True)
class Point:
    """A plan in few figures. tbt_s: the least TBT promise that it keeps, beside a prefill too."""

    layout: Layout
    gpus: int
    ttft_s: float
    tbt_s: float


@dataclass(frozen=True)
class Marginal:
    """The question solved again with one figure moved: what the objective becomes.

    change: the figure that moved: "node", "device" (of a single machine), "ttft" or "tbt"
    gpus, ttft_s, tbt_s: what was asked; ttft_s is None where TTFT is what more devices are to buy
    minimised: what `before` (in the plan) and `objective` (now) are figures of, as in `Optimality`
    point: the plan that reaches it; both are None if no plan keeps what was asked
    """

    change: str
    gpus: int
    ttft_s: float | None
    tbt_s: float
    minimised: str
    before: float
    objective: float | None
    point: Point | None


@dataclass(frozen=True)
class Frontier:
    """GPUs × TTFT × TBT: for each TBT promise asked, the least TTFT of every number of GPUs.

    points: by GPUs, then TTFT; none is as good as another in all three. Each is the exact optimum for its
    GPUs and some promise of `tbt_s`; one that is less than `step` faster than one on fewer GPUs is left out.
    """

    tbt_s: tuple[float, ...]
    step: float
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Relaxation:
    """A promise near the one asked that some plan keeps. relaxed: of "ttft", "tbt", "nodes"."""

    relaxed: tuple[str, ...]
    layout: Layout
    nodes: int
    gpus: int
    ttft_s: float
    tbt_s: float
