"""What a chosen plan is predicted to do: figures broken into parts, memory, and its chunk rules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ..artifact import ChunkRule, Memory, Prediction
from .chunks import Floats, Sizes, decode_sizes, prefill_sizes
from .cluster import Cluster
from .cost import PARTS
from .footprint import Step
from .formulas import StageFormulas, compile_parts
from .outlook import Outlook
from .price import Pricer
from .room import NONE, Room
from .search import Finding

Parts = Mapping[str, NDArray[np.float64]]


def predict(finding: Finding, formulas: StageFormulas, pricer: Pricer) -> Prediction:
    """TTFT, TBT and throughput of `outlook`'s definitions, with parts that add up to each."""
    outlook, split, choice = finding.outlook, finding.candidate.split, finding.choice
    parts_of = compile_parts(formulas)
    rows = np.arange(len(choice))
    chunks = outlook.chunks
    picked = _map(chunks.priced, lambda values: values[:, rows, choice])
    weight = chunks.samples.weight[:, rows, choice]
    blocks = parts_of(picked)
    stages = [
        stage_parts(blocks, s, split, heads=outlook.rides, hops=not outlook.overlaps)
        for s in _distinct_stages(split)
    ]
    stages += [dict(blocks["hop"])] if outlook.overlaps else []
    totals = np.stack([sum(stage.values()) for stage in stages])
    slowest = totals.argmax(axis=0)
    last = parts_of(Sizes(*(np.ones(()),) * 6))["head"]
    ttft = {part: 0.0 if outlook.rides else float(last[part]) for part in PARTS}
    for part in PARTS:
        seconds = np.choose(slowest, [stage[part] for stage in stages])
        ttft[part] += float((weight * seconds).sum())
    dearest = float(finding.candidate.tau_s[rows, choice].max())
    ttft["bubble"] = (len(split) - 1) * dearest

    requests = outlook.growth.riders(pricer.workload.concurrency)
    crossing = parts_of(decode_sizes(requests))
    bubble = 0.0
    if finding.tbt_s > outlook.decode_s:
        at = np.unravel_index(np.where(weight > 0, totals.max(axis=0), 0).argmax(), weight.shape)
        crossing = parts_of(_map(picked, lambda values: values[at]))
        bubble = max(0.0, finding.tbt_s - sum(crossing_s(crossing, p, split) for p in PARTS))
    tbt = {part: crossing_s(crossing, part, split) for part in PARTS} | {"bubble": bubble}
    return Prediction(
        ttft_s=sum(ttft.values()),
        tbt_s=sum(tbt.values()),
        throughput_tokens_per_s=pricer.workload.concurrency / outlook.decode_s,
        ttft_parts_s=ttft,
        tbt_parts_s=tbt,
    )


def memory(finding: Finding, pricer: Pricer, room: Room) -> Memory:
    """Bytes on the fullest rank, for the dearest of the chosen chunks and decodes, and room beyond."""
    outlook, rows = finding.outlook, np.arange(len(finding.choice))
    samples = outlook.chunks.samples
    used = samples.weight[:, rows, finding.choice] > 0
    starts, sizes, *counts = (
        values[:, rows, finding.choice][used]
        for values in (samples.start, samples.size, *vars(outlook.chunks.sizes).values())
    )
    needs = outlook.step(Sizes(*counts))
    return held(outlook, finding.candidate.split, pricer.cluster, (starts, sizes), needs, room)


def held(
    outlook: Outlook,
    split: tuple[int, ...],
    cluster: Cluster,
    chunks: tuple[Floats, Floats],
    needs: Step,
    room: Room = NONE,
) -> Memory:
    """Bytes on the fullest rank, for the dearest of some chunks (starts, sizes) and what they need."""
    promised, growth = outlook.stage_bytes(split), outlook.growth
    page = growth.page_size * outlook.footprint.kv_per_token
    more = [layers * room.pages * page for layers in split]
    sizes = [size + beyond for size, beyond in zip(promised, more, strict=True)]
    fullest = sizes.index(max(sizes))
    kv = split[fullest] * growth.pages * page
    at = int(needs.total.argmax())
    start, rows = (int(values[at]) for values in chunks)
    step = f"a chunk of {rows:,} tokens after {start:,}"
    if outlook.decode_bytes > needs.total[at]:
        needs, at = outlook.step(outlook.decodes), 0
        step = f"{growth.concurrency:,} decodes"
    activation, workspace, communication = (int(part[at]) for part in needs.parts)
    return Memory(
        weights_bytes=promised[fullest] - kv,
        kv_bytes=kv,
        activation_bytes=activation,
        workspace_bytes=workspace,
        communication_bytes=communication,
        reserve_bytes=int(cluster["memory.reserve"]),
        capacity_bytes=int(cluster["memory.capacity"]),
        step=step,
        room_kv_bytes=more[fullest],
        room_step_bytes=room.step_bytes,
    )


def chunk_rules(finding: Finding, pricer: Pricer) -> tuple[ChunkRule, ...]:
    """Neighbouring buckets of one chunk size joined, and cut where one more group joins in."""
    grid, outlook = pricer.grid, finding.outlook
    growth = outlook.growth
    joins = [i * growth.stripe for i in range(1, growth.groups)]
    spans: list[list[int]] = []  # start, end, chunk
    for start, end, entry in zip(grid.starts, grid.ends, finding.choice, strict=True):
        size = grid.menu[entry]
        edges = [start, *(join for join in joins if start < join < end), end]
        for low, high in itertools.pairwise(edges):
            if spans and spans[-1][2] == size and low not in joins:
                spans[-1][1] = high
            else:
                spans.append([low, high, size])
    ends = np.array([end for _, end, _ in spans], dtype=float)
    sizes = np.array([min(size, end - start) for start, end, size in spans], dtype=float)
    riders = growth.riders(pricer.workload.concurrency - 1)
    blocks = pricer.wiring(outlook.layout).totals(
        prefill_sizes(ends - sizes, sizes, growth.spread, riders)
    )
    split = finding.candidate.split
    times = [
        _stage_total(blocks, stage, split, heads=outlook.rides, hops=not outlook.overlaps)
        for stage in _distinct_stages(split)
    ]
    times += [blocks["hop"]] if outlook.overlaps else []
    return tuple(
        ChunkRule(start, end, size, int(groups), float(seconds))
        for (start, end, size), groups, seconds in zip(
            spans, growth.spread.active(ends), np.maximum.reduce(times), strict=True
        )
    )


def _distinct_stages(split: tuple[int, ...]) -> Iterable[int]:
    """Stages of which one is slowest: the first, the last and the tallest between."""
    between = range(1, len(split) - 1)
    tallest = [max(between, key=lambda s: split[s])] if between else []
    return dict.fromkeys((0, *tallest, len(split) - 1))


def _blocks(stage: int, split: tuple[int, ...], heads: bool, hops: bool) -> Mapping[str, int]:
    """How often a stage runs each block, and waits for a hop."""
    last = len(split) - 1
    return {
        "step": 1,
        "entry": 1,
        "layer": split[stage],
        "embed": int(stage == 0),
        "head": int(stage == last and heads),
        "hop": int(stage < last and hops),
    }


def stage_parts(
    parts: Mapping[str, Parts], stage: int, split: tuple[int, ...], *, heads: bool, hops: bool
) -> dict[str, NDArray[np.float64]]:
    """Seconds of one stage by part, from seconds by block and part; with its hop or without."""
    counts = _blocks(stage, split, heads, hops)
    return {
        part: np.asarray(sum(n * parts[block][part] for block, n in counts.items()))
        for part in PARTS
    }


def _stage_total(
    blocks: Parts, stage: int, split: tuple[int, ...], *, heads: bool, hops: bool
) -> NDArray[np.float64]:
    counts = _blocks(stage, split, heads, hops)
    return np.asarray(sum(n * blocks[block] for block, n in counts.items()))


def through(seconds: Floats, arrived: Floats) -> Floats:
    """When chunks that arrive then leave a stage that takes them one by one: [chunks]."""
    spent = np.cumsum(seconds)
    return np.asarray(spent + np.maximum.accumulate(arrived - spent + seconds))


def crossing_s(parts: Mapping[str, Parts], part: str, split: tuple[int, ...]) -> float:
    return sum(
        float(n * parts[block][part])
        for stage in range(len(split))
        for block, n in _blocks(stage, split, heads=True, hops=True).items()
    )


def _map(sizes: Sizes, function: object) -> Sizes:
    assert callable(function)
    return Sizes(*(function(getattr(sizes, f.name)) for f in dataclasses.fields(sizes)))
