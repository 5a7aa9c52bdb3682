"""Re-checks a finished plan, without the code that made it.

Reads only what the artifact says (the plan, the promise, the model) and the formulas; lays the chunks out
one by one as the scheduler will, sends them through the pipeline stage by stage, counts weights from
the checkpoint's own tensor shapes and pages request by request, and says what does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..artifact import FP8, Plan, Workload
from ..ir.model import ModelSpec
from .chunks import Sizes
from .cluster import Cluster
from .counting import HALVES
from .formulas import StageFormulas, compile_totals

Floats = NDArray[np.float64]
Blocks = Mapping[str, Floats]
Price = Callable[[Sizes], Blocks]

TOLERANCE = 1 + 1e-6
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_BYTES = 4  # of each output channel of an fp8 weight
LSE_BYTES = 16  # behind each head of a partial row that travels
WHOLE = ("norm.weight", "layernorm.weight")  # every tp rank holds these whole


def violations(
    plan: Plan, spec: ModelSpec, cluster: Cluster, workload: Workload, formulas: StageFormulas
) -> tuple[str, ...]:
    """Everything about the plan that does not hold, in words; empty if it is sound."""
    price = compile_totals(formulas)
    return (
        *_layout(plan, spec, cluster),
        *_overlap(plan, formulas),
        *_sums(plan, spec, cluster),
        *_rules(plan, workload),
        *_pages(plan, workload),
        *_memory(plan, spec, cluster),
        *_step_memory(plan, spec, cluster, workload),
        *_times(plan, workload, price),
        *_parts(plan),
    )


def _layout(plan: Plan, spec: ModelSpec, cluster: Cluster) -> Iterator[str]:
    tp = plan.layout.tp
    if plan.gpus > cluster.devices:
        yield f"{plan.gpus} devices of {cluster.devices}"
    alone = spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0  # no rank has a part of one
    if tp > cluster.devices_per_node or spec.num_heads % tp or not alone:
        yield f"tp={tp} does not fit"
    every = tp * plan.layout.kvp
    if plan.layout.helix and (every == tp or spec.num_heads % every or spec.ffn % every):
        yield f"helix does not fit {plan.layout}"
    layers = [stage.num_layers for stage in plan.stages]
    firsts = [sum(layers[:s]) for s in range(len(layers))]
    if len(layers) != plan.layout.spp or sum(layers) != spec.num_layers or min(layers) < 1:
        yield f"stages of {layers} layers"
    if firsts != [stage.first_layer for stage in plan.stages]:
        yield "stages do not follow one another"


def _overlap(plan: Plan, formulas: StageFormulas) -> Iterator[str]:
    """Halves are priced as they will be run; that they pay is the times' business."""
    priced = formulas[HALVES].least_rows if HALVES in formulas else 0
    if plan.overlap_rows != priced:
        yield f"chunks of {plan.overlap_rows} rows go in halves, priced is {priced}"
    if plan.overlap_rows and (plan.layout.kvp == 1 or plan.overlap_rows < 2):
        yield f"halves of {plan.overlap_rows} rows on {plan.layout}"


def _sums(plan: Plan, spec: ModelSpec, cluster: Cluster) -> Iterator[str]:
    """Sums are read from the peers' memory where all of it can be, and where NCCL is no faster."""
    rows, tp = plan.one_shot_rows, plan.layout.tp
    if rows == 0:
        return
    if plan.layout.helix or tp > cluster.switched:
        yield f"ranks of {plan.layout} cannot read one another's memory"
    moved_s = rows * spec.hidden * ITEM_BYTES[plan.dtype] / cluster["links.intra.bandwidth"]
    moved_s, alpha = moved_s / cluster["efficiency.link"], cluster["links.intra.latency"]
    summed_s = 2 * (math.ceil(math.log2(tp)) * alpha + (1 - 1 / tp) * moved_s)
    if 2 * alpha + (tp - 1) * moved_s > summed_s:
        yield f"{rows} rows are read from {tp} ranks where NCCL sums them sooner"


def _rules(plan: Plan, workload: Workload) -> Iterator[str]:
    edge = 0
    for rule in plan.chunks:
        if rule.start != edge or rule.end <= rule.start or rule.chunk < 1:
            yield f"chunk rule {rule.start}..{rule.end} after {edge}"
        if rule.groups != min(plan.layout.kvp, math.ceil(rule.end / plan.stripe_tokens)):
            yield f"{rule.groups} groups at {rule.end} tokens"
        edge = rule.end
    if edge != workload.context:
        yield f"chunk rules end at {edge} of {workload.context}"


def _pages(plan: Plan, workload: Workload) -> Iterator[str]:
    """Requests laid end to end around the ring of groups; striped, all are at home on one."""
    total, kvp = workload.context + workload.output_tokens, plan.layout.kvp
    if plan.stripe_tokens % plan.page_size:
        yield "stripes are not whole pages"
    used = [0] * kvp
    group = 0
    for _ in range(workload.concurrency):
        stripes = -(-total // plan.stripe_tokens)
        for i in range(stripes):
            here = min(plan.stripe_tokens, total - i * plan.stripe_tokens)
            used[(group + i) % kvp] += math.ceil(here / plan.page_size)
        group += stripes if stripes <= kvp else 0
    if max(used) > plan.promised_pages:
        yield f"{max(used)} pages needed, {plan.promised_pages} of {plan.num_pages} planned"
    if plan.max_batch < workload.concurrency:
        yield "too few sequences may decode together"
    if plan.max_batch > plan.num_pages * kvp:
        yield f"{plan.max_batch} sequences may decode together, on fewer pages"
    _, sizes = lay_out(plan, workload)
    if plan.max_rows < sizes.max() + plan.max_batch:
        yield f"{plan.max_rows} rows are fewer than a chunk and {plan.max_batch} decodes"


def _memory(plan: Plan, spec: ModelSpec, cluster: Cluster) -> Iterator[str]:
    tp, item = plan.layout.tp, ITEM_BYTES[plan.dtype]
    kv_heads = math.ceil(spec.num_kv_heads / tp)
    kv_item = 1 if plan.precision.kv_cache == FP8 else item
    kv_token = 2 * kv_heads * spec.head_dim * kv_item
    ranks = tp * plan.layout.kvp if plan.layout.helix else tp
    kv_rows = kv_heads * spec.head_dim
    sizes = {}
    for name, shape in spec.tensors().items():
        elements = _rank_elements(name, shape, tp, kv_rows, ranks)
        sizes[name] = elements * item
        if plan.precision.weights == FP8 and name.endswith("_proj.weight"):
            by_rows = name.endswith(("o_proj.weight", "down_proj.weight"))  # cut along the inputs
            channels = shape[0] if by_rows else elements // shape[1]
            sizes[name] = elements + channels * SCALE_BYTES
    head = sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"])
    fullest = 0
    for s, stage in enumerate(plan.stages):
        layers = range(stage.first_layer, stage.first_layer + stage.num_layers)
        prefixes = tuple(f"model.layers.{layer}." for layer in layers)
        weights = sum(size for name, size in sizes.items() if name.startswith(prefixes))
        weights += sizes["model.embed_tokens.weight"] if s == 0 else 0
        weights += head + sizes["model.norm.weight"] if s == len(plan.stages) - 1 else 0
        kv = stage.num_layers * plan.num_pages * plan.page_size * kv_token
        fullest = max(fullest, weights + kv)
    planned = plan.memory.weights_bytes + plan.memory.kv_bytes + plan.memory.room_kv_bytes
    if planned != fullest:
        yield f"{planned} bytes of weights and KV planned, {fullest} counted"
    capacity, reserve = int(cluster["memory.capacity"]), int(cluster["memory.reserve"])
    held = plan.memory
    if (held.capacity_bytes, held.reserve_bytes) != (capacity, reserve):
        yield "capacity and reserve are not the cluster's"
    step = held.activation_bytes + held.workspace_bytes + held.communication_bytes
    if fullest + step + held.room_step_bytes + reserve > capacity:
        yield "the fullest rank does not fit"
    tallest = max(stage.num_layers for stage in plan.stages)
    if plan.host_pages * tallest * plan.page_size * kv_token > cluster.host_bytes:
        yield f"{plan.host_pages} pages do not fit in host memory"


def _step_memory(
    plan: Plan, spec: ModelSpec, cluster: Cluster, workload: Workload
) -> Iterator[str]:
    """What no program can do without, chunk by chunk: its rows, what it swaps, what is on its way."""
    starts, sizes = lay_out(plan, workload)
    layout, item = plan.layout, ITEM_BYTES[plan.dtype]
    ranks = layout.tp * layout.kvp if layout.helix else layout.tp
    ffn, heads = spec.ffn / ranks, spec.num_heads / layout.tp
    row = item * (2 * spec.hidden + 3 * ffn)  # input, residual, gate and up, their product
    in_ffn = sizes * row
    peers = np.minimum(np.ceil((starts + sizes) / plan.stripe_tokens), layout.kvp) - 1
    swapped = 2 * sizes * peers * spec.num_heads / ranks * (spec.head_dim * item + LSE_BYTES)
    in_merge = sizes * item * (spec.hidden + 2 * heads * spec.head_dim) + swapped
    on_links = layout.spp + 1 + (layout.spp > 2)  # sent, and by a stage between two also received
    sent = on_links * sizes * spec.hidden * item * (layout.spp > 1)
    kept = 8 * workload.context * workload.concurrency + 4 * plan.promised_pages
    groups = sum(degree > 1 for degree in (layout.tp, layout.spp, layout.kvp)) + layout.helix
    library = groups * cluster.communicator_bytes if groups else 0
    library += 2 * plan.one_shot_rows * spec.hidden * item  # what tp peers read
    held = plan.memory
    planned = held.activation_bytes + held.workspace_bytes + held.communication_bytes
    for what, rows in (("FFN", in_ffn), ("merge", in_merge)):
        needed = int((rows + sent).max()) + kept + library
        if planned < needed:
            yield f"{planned} bytes planned for a step whose {what} needs {needed}"
    logits = float(_decodes(plan, workload).R) * spec.vocab * 4 + kept + library
    if planned < logits:
        yield f"{planned} bytes planned for decodes whose logits need {logits}"
    if held.workspace_bytes < kept or held.communication_bytes < library:
        yield "workspace and communication do not hold what is kept from step to step"
    if plan.max_batch == workload.concurrency:
        return
    kept += 8 * layout.kvp * plan.page_size * (plan.num_pages - plan.promised_pages)
    most = planned + held.room_step_bytes - kept - library
    for what, least in (
        ("rows", int(plan.max_rows * row)),
        ("decodes' logits", plan.max_batch * spec.vocab * 4),
    ):
        if most < least:
            yield f"{most} bytes with room for more: {what} need {least}"


def _rank_elements(name: str, shape: tuple[int, ...], tp: int, kv_rows: int, ranks: int) -> int:
    """Elements of a checkpoint tensor on one rank.

    kv_rows: rows of its keys, or of its values; ranks: that share output projection and FFN
    """
    if ".k_proj." in name or ".v_proj." in name:
        return math.prod((kv_rows, *shape[1:]))
    if ".o_proj." in name or ".mlp." in name:
        return math.prod(shape) // ranks
    vocabulary = "embed_tokens" in name or "lm_head" in name
    whole = name.endswith(WHOLE) or (vocabulary and shape[0] % tp)
    return math.prod(shape) // (1 if whole else tp)


def _times(plan: Plan, workload: Workload, price: Price) -> Iterator[str]:
    starts, sizes = lay_out(plan, workload)
    last = np.arange(len(starts)) == len(starts) - 1
    blocks = _busiest(plan, workload, starts, sizes, last, price)
    stages = _stage_times(plan, blocks)
    stations = stages
    if plan.target != "cpu" and workload.concurrency == 1:  # a link is a station of its own
        alone = _stage_times(plan, {**blocks, "hop": np.zeros(len(starts))})
        stations = [alone[0], *(t for stage in alone[1:] for t in (blocks["hop"], stage))]
    done = np.zeros(len(starts))
    for times in stations:
        spent = np.cumsum(times)
        done = spent + np.maximum.accumulate(done - spent + times)
    ttft_s = float(done[-1])
    if ttft_s > workload.ttft_s * TOLERANCE:
        yield f"TTFT {ttft_s} breaks the promise of {workload.ttft_s}"
    # Predicted is a bound. Of a chunk whose stripe lies elsewhere it counts up to half a chunk of keys too
    # many, beside no fewer than a stripe of them, which is no shorter than the chunk (see `chunks`).
    striped = plan.stripe_tokens * plan.layout.kvp < workload.context + workload.output_tokens
    tightness = 0.9 / 1.5 if striped else 0.9
    least_s = tightness * (plan.predicted.ttft_s - plan.predicted.ttft_parts_s["bubble"])
    if not least_s <= ttft_s <= plan.predicted.ttft_s * TOLERANCE:
        yield f"TTFT {ttft_s} where {plan.predicted.ttft_s} is predicted"
    body = slice(None) if workload.concurrency > 1 else np.flatnonzero(~last)
    mixed_s = len(stages) * max(float(t[body].max(initial=0.0)) for t in stages)
    if mixed_s > workload.tbt_s * TOLERANCE:
        yield f"a prefill micro-batch takes {mixed_s}, TBT is {workload.tbt_s}"
    alone_s = float(sum(_stage_times(plan, price(_decodes(plan, workload)))))
    expected = max(alone_s, mixed_s if workload.concurrency > 1 else 0.0)
    if alone_s > workload.tbt_s * TOLERANCE:
        yield f"decodes take {alone_s}, TBT is {workload.tbt_s}"
    if not 0.95 * plan.predicted.tbt_s <= expected <= plan.predicted.tbt_s * TOLERANCE:
        yield f"TBT {expected} where {plan.predicted.tbt_s} is predicted"


def lay_out(plan: Plan, workload: Workload) -> tuple[Floats, Floats]:
    """Start and size of every chunk, as the scheduler cuts them."""
    starts: list[int] = []
    cached = 0
    for rule in plan.chunks:
        starts.extend(range(cached, rule.end, rule.chunk))
        if starts:
            cached = starts[-1] + rule.chunk
    edges = np.array([*starts, workload.context], dtype=float)
    return edges[:-1], np.diff(edges)


def _busiest(
    plan: Plan,
    workload: Workload,
    starts: Floats,
    sizes: Floats,
    last: NDArray[np.bool_],
    price: Price,
) -> Blocks:
    """Blocks of each chunk on the group that asks most of it."""
    riders, tokens, rows, swapped = _riders(plan, workload, workload.concurrency - 1)
    ends, kvp = starts + sizes, plan.layout.kvp
    active = np.minimum(np.ceil(ends / plan.stripe_tokens), kvp)
    pairs, keys = np.zeros_like(ends), np.zeros_like(ends)
    for group in range(int(active[-1])):
        before, _ = _seen(plan, group, starts)
        seen, held = _seen(plan, group, ends)
        pairs, keys = np.maximum(pairs, seen - before), np.maximum(keys, held)
    computing = np.full_like(active, kvp) if plan.layout.helix else active
    blocks = price(
        Sizes(
            T=sizes + rows,
            R=riders + last.astype(float),
            QK=pairs,
            KV=keys,
            KD=np.full_like(sizes, riders * tokens),
            X=sizes * (computing - 1) + swapped,
        )
    )
    return {**blocks, "head": blocks["head"] * (riders + last > 0)}


def _seen(plan: Plan, group: int, queries: Floats) -> tuple[Floats, Floats]:
    """Keys of a group's stripes that a request's first queries see in all, and how many there are then.

    Of a stripe of m: 1 + 2 + … + m + m + m …, for as many queries as follow its start.
    """
    m = plan.stripe_tokens
    starts = np.arange(group * m, max(float(queries[-1]), group * m + 1), m * plan.layout.kvp)
    full = np.searchsorted(starts + m, queries, side="right")
    sums = np.concatenate([[0.0], np.cumsum(starts)])[full]
    begun = np.append(starts, np.inf)[full]
    inside = np.maximum(queries - begun, 0)
    pairs = full * (m * (m + 1) / 2 + (queries - m) * m) - sums * m + inside * (inside + 1) / 2
    return pairs, full * m + inside


def _riders(plan: Plan, workload: Workload, requests: int) -> tuple[int, int, int, int]:
    """Decodes with tokens on the busiest group, tokens of each there, decodes that it computes, and the
    partial rows that it swaps for them.
    """
    total, kvp, m = workload.context + workload.output_tokens, plan.layout.kvp, plan.stripe_tokens
    held = sum(min(m, total - start) for start in range(0, total, kvp * m))
    tokens = math.ceil(held / plan.page_size) * plan.page_size
    groups = min(kvp, math.ceil(total / m))
    loads = [0] * kvp
    for place in range(requests * groups):
        loads[place % kvp] += 1
    if plan.layout.helix:
        return max(loads), tokens, requests, requests * (kvp - 1)
    return max(loads), tokens, max(loads), max(loads) * (groups - 1)


def _decodes(plan: Plan, workload: Workload) -> Sizes:
    held, tokens, rows, swapped = _riders(plan, workload, workload.concurrency)
    numbers = (rows, held, 0, 0, held * tokens, swapped)
    return Sizes(*(np.array(float(number)) for number in numbers))


def _stage_times(plan: Plan, blocks: Blocks) -> list[Floats]:
    final = len(plan.stages) - 1
    result = []
    for s, stage in enumerate(plan.stages):
        seconds = blocks["step"] + blocks["entry"] + stage.num_layers * blocks["layer"]
        if s == 0:
            seconds = seconds + blocks["embed"]
        seconds = seconds + blocks["head" if s == final else "hop"]
        result.append(np.asarray(seconds))
    return result


def _parts(plan: Plan) -> Iterator[str]:
    said = plan.predicted
    for name, whole, parts in (
        ("TTFT", said.ttft_s, said.ttft_parts_s),
        ("TBT", said.tbt_s, said.tbt_parts_s),
    ):
        if (
            not math.isclose(sum(parts.values()), whole, rel_tol=1e-9)
            or min(parts.values()) < -1e-9
        ):
            yield f"the parts of {name} do not add up"
