"""What a pinned configuration is predicted to do: TTFT, TBT and throughput with bands, and memory.

**TTFT** is that of a prompt that has the engine to itself, after `cached` tokens that are there already. Its
chunks are laid out as the scheduler cuts them and go through the stages one behind the other. **TBT** is
that of `concurrency` such requests that decode together, half way through their output; throughput is
concurrency / TBT.

**Context parallelism** (`cp` = N, ring attention) in place of SPP and KVP, for comparison: each of N ranks
(of tp devices) holds every layer and 1/N of the prompt. One pass, no chunks; in each layer N steps of
attention over one rank's keys, while those keys travel on round the ring:

    layer = rest(T = prompt/N) + own + (N − 1)·max(step, α + bytes/β)

where own + (N − 1)·step is the busiest rank's attention, with the merge of each step's partial result in it.
Striped (Striped Attention, arXiv 2311.09431), each rank has every Nth token: causal work is even, own and
step are attention/N each. Contiguous (Ring Attention, arXiv 2310.01889), each has a run of the prompt:
whoever has the last sees all keys of all others, so only its own block has a causal half to leave out,
and its attention is 2 − 1/N times as much. Decodes under it merge partial results over the N ranks as
KVP groups do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..artifact import NEVER_HALVED, ChunkRule, Memory, Workload
from ..ir.model import ModelSpec
from ..layout import Layout
from .candidate import best_chunks, make_candidate
from .chunks import Floats, Riders, Sizes, decode_sizes, prefill_sizes
from .cluster import Cluster
from .configuration import Configuration, check_configuration, contiguous, growths_of, riders_of
from .cost import PARTS, links_of
from .evidence import Estimate, Use, estimate, uses_of
from .footprint import Step
from .formulas import compile_parts
from .outlook import NEVER, Outlook
from .precision import precision_notes
from .predict import chunk_rules, crossing_s, held, stage_parts, through
from .price import Pricer
from .search import Finding
from .space import Growth

Parts = Mapping[str, float]


@dataclass(frozen=True)
class Forecast:
    """The answer. chunks: (first token, tokens of each chunk) where the size changes.

    stripe_tokens, overlap_rows, one_shot_rows: as in `artifact.Plan`
    dtype: of all that the configuration's precision leaves alone
    """

    ttft: Estimate
    tbt: Estimate
    throughput_tokens_per_s: float
    memory: Memory
    stages: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    stripe_tokens: int
    overlap_rows: int
    one_shot_rows: int
    uses: tuple[Use, ...]
    notes: tuple[str, ...]
    dtype: str

    @property
    def fits(self) -> bool:
        return self.memory.fits


def forecast(spec: ModelSpec, cluster: Cluster, asked: Configuration) -> Forecast:
    """BadInput and UsageError say what about the question makes no sense."""
    check_configuration(spec, cluster, asked)
    dtype = "float32" if cluster.target == "cpu" else spec.dtype
    workload = Workload(asked.tokens, NEVER, NEVER, asked.output)
    overlap = (
        NEVER_HALVED if asked.cp > 1 else asked.overlap
    )  # a ring's keys travel, not its results
    pricer = Pricer(
        spec,
        cluster,
        dtype,
        workload,
        asked.precision,
        eager=asked.eager,
        overlap=overlap,
        all_reduce=asked.all_reduce,
    )
    if asked.cp > 1:
        return _ring(pricer, asked)
    found = _best([pricer.outlook(asked.layout, growth) for growth in growths_of(asked)])
    outlook = found.outlook
    rules = chunk_rules(found, pricer)
    starts, sizes = _lay_out(asked, rules)
    split = found.candidate.split
    parts = compile_parts(pricer.formulas(asked.layout))
    chunks = prefill_sizes(starts, sizes, outlook.growth.spread, Riders(0, 0, 1))
    blocks = parts(chunks)
    hops = not outlook.overlaps
    stages = [stage_parts(blocks, s, split, heads=False, hops=hops) for s in range(len(split))]
    head = parts(decode_sizes(Riders(1, 1, 1)))["head"]
    for part in PARTS:
        stages[-1][part] = stages[-1][part] + head[part] * (
            np.arange(len(starts)) == len(starts) - 1
        )
    ttft = _pipelined(stages, blocks["hop"] if outlook.overlaps else None)
    return _answer(
        pricer,
        asked,
        outlook,
        split,
        (starts, sizes),
        ttft,
        _decode(pricer, asked, split, outlook.growth),
        outlook.step(chunks),
    )


def _best(outlooks: Sequence[Outlook]) -> Finding:
    """The growth, split and chunks of least TTFT, whether or not memory holds them."""
    found: Finding | None = None
    for outlook, split in ((o, split) for o in outlooks for split in o.splits()):
        candidate = make_candidate(outlook, split, NEVER, 1 << 62)
        best = best_chunks(candidate)
        assert best is not None, "without promises every chunk is allowed"
        if found is None or best[0] < found.ttft_s:
            found = Finding(candidate, best[1], best[0])
    assert found is not None
    return found


def _lay_out(asked: Configuration, rules: tuple[ChunkRule, ...]) -> tuple[Floats, Floats]:
    """Start and size of every chunk of the prompt, as the scheduler cuts them."""
    if asked.chunk is not None:
        edges = [*range(asked.cached, asked.tokens, asked.chunk), asked.tokens]
        return np.array(edges[:-1], dtype=float), np.diff(edges).astype(float)
    starts: list[int] = []
    at = asked.cached
    for rule in rules:
        starts.extend(range(at, rule.end, rule.chunk))
        if at < rule.end:
            at = starts[-1] + rule.chunk
    edges = [*starts, asked.tokens]
    return np.array(edges[:-1], dtype=float), np.diff(edges).astype(float)


def _pipelined(stages: list[dict[str, Floats]], hop: Mapping[str, Floats] | None) -> Parts:
    """Parts of the busiest stage, and the bubble: how much later than it the last stage is done.

    hop: on each link between two stages, where it is not in their times
    """
    stations = stages[:1]
    for stage in stages[1:]:
        stations += [dict(hop), stage] if hop is not None else [stage]
    times = [np.asarray(sum(station.values())) for station in stations]
    done = np.zeros_like(times[0])
    for spent in times:
        done = through(spent, done)
    busiest = max(range(len(times)), key=lambda s: float(times[s].sum()))
    parts = {part: float(seconds.sum()) for part, seconds in stations[busiest].items()}
    return parts | {"bubble": max(0.0, float(done[-1]) - sum(parts.values()))}


def _decode(pricer: Pricer, asked: Configuration, split: tuple[int, ...], growth: Growth) -> Parts:
    """A token's way through all stages, with the other requests' tokens beside it."""
    layout = dataclasses.replace(asked.layout, kvp=growth.kvp)
    blocks = compile_parts(pricer.formulas(layout))(decode_sizes(riders_of(asked, growth)))
    return {part: crossing_s(blocks, part, split) for part in PARTS}


def _ring(pricer: Pricer, asked: Configuration) -> Forecast:
    """Ring attention, as above."""
    cluster, layers, ranks = pricer.cluster, pricer.spec.num_layers, asked.cp
    layout = Layout(asked.layout.tp, 1, 1)
    outlook = pricer.outlook(layout, contiguous(asked, ranks))
    rows = asked.prompt / ranks
    pairs, step = _ring_pairs(asked)
    received = rows * (ranks - 1)
    numbers = (rows, 1.0, pairs, float(asked.tokens), 0.0, received)
    chunk = Sizes(*(np.array(number) for number in numbers))
    blocks = compile_parts(pricer.formulas(Layout(layout.tp, 1, ranks)))
    parts = {part: crossing_s(blocks(chunk), part, (layers,)) for part in PARTS}
    unmoved = blocks(dataclasses.replace(chunk, X=np.zeros(())))
    parts["communication"] = crossing_s(unmoved, "communication", (layers,))
    link = f"links.{links_of(Layout(layout.tp, 1, ranks), cluster).kvp}"
    keys = outlook.footprint.kv_per_token * asked.tokens / ranks
    travel_s = cluster[f"{link}.latency"] + keys / (
        cluster[f"{link}.bandwidth"] * cluster["efficiency.link"]
    )
    step_s = parts["attention"] / layers * step / pairs
    parts["communication"] += layers * (ranks - 1) * max(0.0, travel_s - step_s)
    needs = outlook.step(chunk)
    travelling = 2 * math.ceil(keys) + pricer.communication_bytes(1)
    needs = dataclasses.replace(needs, communication=needs.communication + travelling)
    once = (np.array([float(asked.cached)]), np.array([rows]))
    decode = _decode(pricer, asked, (layers,), outlook.growth)
    return _answer(pricer, asked, outlook, (layers,), once, parts | {"bubble": 0.0}, decode, needs)


def _ring_pairs(asked: Configuration) -> tuple[float, float]:
    """Pairs of query and key that the busiest rank computes, and in one step while others' keys travel."""
    rows = asked.prompt / asked.cp
    if asked.ring == "striped":
        pairs = rows * asked.cached + rows * (asked.prompt + 1) / 2
        return pairs, pairs / asked.cp
    others, own = asked.tokens - rows, rows * (rows + 1) / 2
    return rows * others + own, rows * asked.tokens / asked.cp


def _answer(
    pricer: Pricer,
    asked: Configuration,
    outlook: Outlook,
    split: tuple[int, ...],
    chunks: tuple[Floats, Floats],
    ttft: Parts,
    tbt: Parts,
    needs: Step,
) -> Forecast:
    riders = riders_of(asked, outlook.growth)
    uses = uses_of(asked, pricer.spec, pricer.cluster, outlook.footprint, chunks[1], riders)
    memory = held(outlook, split, pricer.cluster, chunks, needs)
    decode_s = sum(tbt.values())
    return Forecast(
        ttft=estimate(ttft, [u for u in uses if u.figure == "ttft"]),
        tbt=estimate(tbt, [u for u in uses if u.figure == "tbt"]),
        throughput_tokens_per_s=asked.concurrency / decode_s,
        memory=memory,
        stages=split,
        chunks=_changes(*chunks),
        stripe_tokens=outlook.growth.stripe,
        overlap_rows=outlook.overlap_rows,
        one_shot_rows=pricer.one_shot_rows(asked.layout),
        uses=uses,
        notes=tuple(_notes(pricer, asked, memory)),
        dtype=pricer.dtype,
    )


def _changes(starts: Floats, sizes: Floats) -> tuple[tuple[int, int], ...]:
    first = np.concatenate([[True], np.diff(sizes) != 0])
    return tuple(
        zip(starts[first].astype(int).tolist(), sizes[first].astype(int).tolist(), strict=True)
    )


def _notes(pricer: Pricer, asked: Configuration, memory: Memory) -> list[str]:
    spec, notes = pricer.spec, list[str]()
    if not memory.fits:
        notes.append("It does not fit: the fullest rank needs more memory than it may use.")
    if asked.tokens + asked.output > spec.max_position:
        notes.append(
            f"{spec.name} was trained for {spec.max_position:,} positions; "
            f"{asked.tokens + asked.output:,} need RoPE scaling to give useful answers."
        )
    if asked.cp > 1:
        notes.append("Ring attention is a comparison: no plan is made or emitted for it.")
    return [*notes, *precision_notes(pricer.cluster, asked.precision)]
