"""The prompt's way through the pipeline: when each chunk is in each stage, and what it costs there.

A chunk enters a stage when it has left the stage before and the chunk before it has left this one:

    end[s, i] = max(end[s − 1, i], end[s, i − 1]) + τ[s, i]

Where hops run beside the stages (see `outlook`), a link is a stage of its own, between two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from ..artifact import Plan, Workload
from ..timeline import Iteration, Slot, Timeline
from .check import lay_out
from .chunks import Floats, Sizes, prefill_sizes
from .cost import PARTS
from .formulas import StageFormulas, compile_parts
from .predict import stage_parts, through
from .space import Growth
from .workload import total_tokens

MARGIN = 4  # chunks that are kept beyond those that fill the pipeline


def make_timeline(plan: Plan, workload: Workload, formulas: StageFormulas) -> Timeline:
    """The plan over one prompt of the promised context, with the promised other requests riding."""
    starts, sizes = lay_out(plan, workload)
    times, hops = _times(plan, workload, formulas, starts, sizes)
    slowest = times.sum(axis=1).argmax(axis=0)
    begins, ends = _pipeline(_with_logits(plan, workload, formulas, times).sum(axis=1), hops)
    groups = _growth(plan, workload).spread.active(starts + sizes)
    count, few = len(starts), plan.layout.spp + MARGIN
    whole = count <= 2 * few
    return Timeline(
        num_chunks=count,
        iterations=tuple(
            Iteration(
                number=i + 1,
                start=int(starts[i]),
                tokens=int(sizes[i]),
                groups=int(groups[i]),
                parts_s=dict(zip(PARTS, times[slowest[i], :, i].tolist(), strict=True)),
            )
            for i in _corners(plan, starts)
        ),
        filling=tuple(_slots(begins, ends, range(count if whole else few))),
        draining=tuple(
            _slots(begins, ends, range(0 if whole else count - few, 0 if whole else count))
        ),
        end_s=float(ends[-1, -1]),
    )


def _growth(plan: Plan, workload: Workload) -> Growth:
    layout, total = plan.layout, total_tokens(workload)
    requests = workload.concurrency
    return Growth(layout.kvp, plan.stripe_tokens, total, plan.page_size, requests, layout.helix)


def _times(
    plan: Plan, workload: Workload, formulas: StageFormulas, starts: Floats, sizes: Floats
) -> tuple[Floats, Floats]:
    """Seconds of each chunk in each stage by part [stages, parts, chunks], and beside them on a link."""
    growth = _growth(plan, workload)
    riders = growth.riders(workload.concurrency - 1)
    blocks = compile_parts(formulas)(prefill_sizes(starts, sizes, growth.spread, riders))
    split = tuple(stage.num_layers for stage in plan.stages)
    beside = plan.target != "cpu" and riders.count == 0
    stages = [
        stage_parts(blocks, s, split, heads=riders.count > 0, hops=not beside)
        for s in range(len(split))
    ]
    hops = np.asarray(sum(blocks["hop"].values())) * beside
    return np.stack([np.stack([stage[part] for part in PARTS]) for stage in stages]), hops


def _with_logits(plan: Plan, workload: Workload, formulas: StageFormulas, times: Floats) -> Floats:
    """With the head of the prompt's last chunk; with riders every chunk has it already."""
    if workload.concurrency > 1:
        return times
    head = compile_parts(formulas)(Sizes(*(np.ones(()),) * 6))["head"]
    result = times.copy()
    result[-1, :, -1] += [float(head[part]) for part in PARTS]
    return result


def _pipeline(times: Floats, hops: Floats) -> tuple[Floats, Floats]:
    """When each chunk enters and leaves each stage, both [stages, chunks]: the recurrence above."""
    ends = np.zeros_like(times)
    arrived = np.zeros(times.shape[1])
    for stage, seconds in enumerate(times):
        ends[stage] = through(seconds, arrived)
        arrived = through(hops, ends[stage])
    return ends - times, ends


def _corners(plan: Plan, starts: Floats) -> list[int]:
    """Indices of the first and the last chunk that starts within each rule, and the last whole one."""
    edges = np.searchsorted(starts, [rule.start for rule in plan.chunks] + [plan.chunks[-1].end])
    pairs = itertools.pairwise(edges)
    corners = {int(i) for low, high in pairs if low < high for i in (low, high - 1)}
    return sorted(corners | {max(0, len(starts) - 2)})


def _slots(begins: Floats, ends: Floats, chunks: range) -> Iterator[Slot]:
    for stage in range(len(begins)):
        for i in chunks:
            yield Slot(stage, i + 1, float(begins[stage, i]), float(ends[stage, i]))
