"""A plan in the words of another engine: the command or file that comes closest, and what it leaves out.

Names of flags and keys were checked against

    vLLM          0.31.0: docs.vllm.ai/en/v0.31.0/cli, docs/serving/{context_parallel_deployment,
                  parallelism_scaling}.md, vllm/config/{parallel,cache,scheduler}.py
    SGLang        0.5.23: sglang/srt/arg_groups/fields/*.py of the wheel, docs/advanced_features/dcp
    TensorRT-LLM  1.4.0rc1: LLM API reference (TorchLlmArgs, KvCacheConfig), docs/source/features/helix.md

and tests/codegen/engine_flags.json records them. Layouts carry over as far as an engine has the axis:

    vLLM          shards KV along the sequence only among the ranks of a tensor-parallel group that would
                  hold copies: with t' = t·k ranks in the group, up to t' ÷ h_kv of them
    SGLang        `--dcp-size` serves MLA models only
    TensorRT-LLM  Helix serves MLA models only, on generation servers
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..artifact import Plan, Workload
from ..errors import UsageError
from ..ir.model import ModelSpec
from ..ir.types import DTYPE_NAMES, ITEMSIZE
from ..layout import Layout
from ..units import format_bytes
from .templating import render

Options = tuple[tuple[str, str], ...]
"""Flags with their values, in order; a flag without a value has an empty one."""


@dataclass(frozen=True)
class Subject:
    """What is exported. gpus_per_node: of the cluster that it was planned for."""

    spec: ModelSpec
    workload: Workload
    plan: Plan
    gpus_per_node: int

    @property
    def tokens(self) -> int:
        """Of one request: prompt and output."""
        return self.workload.context + self.workload.output_tokens

    @property
    def stretched(self) -> bool:
        """Whether requests are longer than what the model was trained for."""
        return self.tokens > self.spec.max_position

    @property
    def split(self) -> list[int]:
        return [stage.num_layers for stage in self.plan.stages]

    @property
    def at_once(self) -> int:
        """Requests that are promised. Room for more is of our own layout, and of our own chunks."""
        return self.workload.concurrency

    @property
    def uneven(self) -> bool:
        return len(set(self.split)) > 1

    def nodes(self, ranks: int) -> int:
        return math.ceil(ranks / self.gpus_per_node)


@dataclass(frozen=True)
class Gap:
    """Something of the plan that the engine cannot express, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Export:
    """text: a shell script or a YAML file, its gaps as comments at its head."""

    engine: str
    version: str
    text: str
    gaps: tuple[Gap, ...]


def export(engine: str, subject: Subject) -> Export:
    """The plan for one of ENGINES; UsageError for any other."""
    if engine not in ENGINES:
        raise UsageError("unknown engine", got=engine, do=f"one of {', '.join(ENGINES)}")
    return ENGINES[engine](subject)


# ---------------------------------------------------------------------------------------------- vLLM


def vllm(it: Subject) -> Export:
    """A `vllm serve` command; KVP groups become one wide tensor-parallel group with DCP inside."""
    plan, layout = it.plan, it.plan.layout
    tp = _largest(layout.kvp, lambda k: it.spec.num_heads % (layout.tp * k) == 0) * layout.tp
    dcp = _largest(layout.kvp, lambda k: k * it.spec.num_kv_heads <= tp and tp % k == 0)
    nodes = it.nodes(tp * layout.spp)
    kv_bytes = _kv_bytes(it, tp, dcp)
    options = (
        ("--dtype", plan.dtype),
        ("--kv-cache-dtype", "auto"),
        ("--max-model-len", str(it.tokens)),
        ("--max-num-seqs", str(it.at_once)),
        ("--max-num-batched-tokens", str(_smallest(plan) + it.at_once)),
        ("--block-size", str(plan.page_size)),
        ("--kv-cache-memory-bytes", str(kv_bytes)),
        ("--tensor-parallel-size", str(tp)),
        ("--pipeline-parallel-size", str(layout.spp)),
        *((("--decode-context-parallel-size", str(dcp)),) if dcp > 1 else ()),
        *(_many_nodes(nodes, ("--master-addr", '"$HEAD"')) if nodes > 1 else ()),
    )
    gaps = [_one_chunk_size("vLLM has one token budget for all iterations", _smallest(plan))]
    if layout.kvp > 1:
        gaps.append(_wide_group(it, tp, dcp))
    if dcp > 1:
        whole = f"the cache is interleaved over all {dcp} ranks from the first token on"
        gaps.append(Gap("KVP growth", whole))
    environment = {}
    if it.uneven:
        environment["VLLM_PP_LAYER_PARTITION"] = _commas(it.split)
    if it.stretched:
        environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return _command(
        it, "vllm", _Line('vllm serve "$MODEL"', options, environment, nodes), gaps, tp, kv_bytes
    )


def _wide_group(it: Subject, tp: int, dcp: int) -> Gap:
    layout = it.plan.layout
    what = _groups(layout)
    if tp == layout.tp:
        return Gap(
            what,
            f"DCP shards the cache only among ranks that would hold copies of a KV head, and a wider "
            f"group than {tp} does not divide the {it.spec.num_heads} heads",
        )
    span = it.nodes(tp)
    crosses = f", so each all-reduce crosses {span} nodes" if span > 1 else ""
    shards = (
        f"its cache is sharded over {dcp} ranks for decode, prefill is not shared out by sequence"
        if dcp > 1
        else "none of its ranks hold copies of a KV head, so DCP has nothing to shard"
    )
    return Gap(what, f"they become one tensor-parallel group of {tp}{crosses}; {shards}")


# -------------------------------------------------------------------------------------------- SGLang


def sglang(it: Subject) -> Export:
    """A `sglang.launch_server` command."""
    plan, layout = it.plan, it.plan.layout
    dynamic = layout.spp > 1
    chunk = max(rule.chunk for rule in plan.chunks) if dynamic else _smallest(plan)
    chunk = _in_pages(chunk, plan.page_size)
    nodes = it.nodes(layout.tp * layout.spp)
    options = (
        ("--dtype", plan.dtype),
        ("--kv-cache-dtype", "auto"),
        ("--context-length", str(it.tokens)),
        ("--max-running-requests", str(it.at_once)),
        ("--chunked-prefill-size", str(chunk)),
        *((("--enable-dynamic-chunking", ""),) if dynamic else (("--enable-mixed-chunk", ""),)),
        ("--page-size", str(plan.page_size)),
        ("--max-total-tokens", str(_pool_tokens(it))),
        ("--tp-size", str(layout.tp)),
        ("--pp-size", str(layout.spp)),
        *(_many_nodes(nodes, ("--dist-init-addr", '"$HEAD:20000"')) if nodes > 1 else ()),
    )
    gaps = [
        Gap(
            "Chunk sizes by context",
            f"with a pipeline SGLang begins with {chunk:,} tokens and shrinks chunks by a fit of its own",
        )
        if dynamic
        else _one_chunk_size("without a pipeline SGLang has one chunk size", chunk)
    ]
    if layout.kvp > 1:
        gaps.append(_no_kvp(it, "--dcp-size serves models with latent attention (MLA) only"))
    environment = {}
    if it.uneven:
        environment["SGLANG_PP_LAYER_PARTITION"] = _commas(it.split)
    if it.stretched:
        environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    start = 'python -m sglang.launch_server --model-path "$MODEL"'
    kv_bytes = _kv_bytes(it, layout.tp, 1)
    line = _Line(start, options, environment, nodes)
    return _command(it, "sglang", line, gaps, layout.tp, kv_bytes)


# -------------------------------------------------------------------------------------- TensorRT-LLM


def trtllm(it: Subject) -> Export:
    """A file for `trtllm-serve --config`."""
    plan, layout = it.plan, it.plan.layout
    block = plan.page_size
    budget = max(_in_pages(_smallest(plan) + it.at_once, block), block * -(-it.at_once // block))
    settings: dict[str, object] = {
        "tensor_parallel_size": layout.tp,
        "pipeline_parallel_size": layout.spp,
        "gpus_per_node": it.gpus_per_node,
        "dtype": plan.dtype,
        "max_seq_len": it.tokens,
        "max_batch_size": it.at_once,
        "max_num_tokens": budget,
        "enable_chunked_prefill": True,
    }
    if it.uneven:
        settings["pp_partition"] = it.split
    cache = {"dtype": "auto", "tokens_per_block": block, "max_tokens": _pool_tokens(it)}
    gaps = [_one_chunk_size("TensorRT-LLM has one token budget for all iterations", budget)]
    if layout.kvp > 1:
        gaps.append(_no_kvp(it, "Helix (cp_config) serves models with latent attention (MLA) only"))
    if it.stretched:
        gaps.append(_trained_for(it, "give the model folder a config.json with RoPE scaling"))
    gaps += _common(it, layout.tp, _kv_bytes(it, layout.tp, 1))
    text = render(
        "export/trtllm.yaml.j2",
        head=_head(it, "trtllm", gaps),
        nodes=it.nodes(layout.tp * layout.spp),
        ranks=layout.tp * layout.spp,
        settings={key: _yaml(value) for key, value in settings.items()},
        cache={key: _yaml(value) for key, value in cache.items()},
    )
    return Export("trtllm", VERSIONS["trtllm"], text, tuple(gaps))


def _yaml(value: object) -> str:
    """A scalar or a list of numbers, as YAML and JSON both write it."""
    return json.dumps(value)


# ------------------------------------------------------------------------------------ common to them


@dataclass(frozen=True)
class _Line:
    """A command on `nodes` nodes: how it starts, its options, and what stands in its environment."""

    start: str
    options: Options
    environment: Mapping[str, str]
    nodes: int


def _command(
    it: Subject, engine: str, line: _Line, gaps: list[Gap], tp: int, kv_bytes: int
) -> Export:
    if it.stretched:
        gaps.append(
            _trained_for(it, "the environment lifts the check, RoPE scaling is still needed")
        )
    gaps += _common(it, tp, kv_bytes)
    text = render(
        "export/command.sh.j2", head=_head(it, engine, gaps), line=line, vllm=engine == "vllm"
    )
    return Export(engine, VERSIONS[engine], text, tuple(gaps))


def _head(it: Subject, engine: str, gaps: list[Gap]) -> dict[str, object]:
    """What stands above: what it is, and its gaps, in lines."""
    title = (
        f"{it.spec.name} for {it.workload.context:,} tokens of context, planned as {it.plan.layout}: "
        f"what comes closest on {NAMES[engine]} {VERSIONS[engine]}."
    )
    lines = [f"{gap.what}: {gap.why}." for gap in gaps]
    wrapped = [textwrap.wrap(line, 94, subsequent_indent="  ") for line in lines]
    return {"title": textwrap.wrap(title, 96), "gaps": wrapped, "engine": NAMES[engine]}


def _many_nodes(nodes: int, address: tuple[str, str]) -> Options:
    return (("--nnodes", str(nodes)), ("--node-rank", '"$RANK"'), address)


def _one_chunk_size(why: str, budget: int) -> Gap:
    return Gap(
        "Chunk sizes by context",
        f"{why}; {budget:,} tokens is what still keeps the time between tokens at full length",
    )


def _groups(layout: Layout) -> str:
    ffn = ", with the FFN over all of them" if layout.helix else ""
    return f"KVP over {layout.kvp} groups of {layout.tp}{ffn}"


def _no_kvp(it: Subject, why: str) -> Gap:
    layout = it.plan.layout
    return Gap(
        f"{_groups(layout)}, and its growth",
        f"{why}; {layout.tp * layout.spp} of {layout.gpus} GPUs are used, and each rank holds "
        f"requests whole",
    )


def _trained_for(it: Subject, do: str) -> Gap:
    return Gap(
        f"{it.tokens:,} positions",
        f"{it.spec.name} was trained for {it.spec.max_position:,}; {do}",
    )


def _common(it: Subject, tp: int, kv_bytes: int) -> list[Gap]:
    """What none of them has; and memory, where the engine needs more than there is."""
    held, layout = it.plan.memory, it.plan.layout
    gaps = []
    needed = _weights_bytes(it) * layout.tp // tp + kv_bytes
    needed += held.promised_bytes - held.weights_bytes - held.kv_bytes
    if needed > held.capacity_bytes:
        have = format_bytes(held.capacity_bytes)
        gaps.append(Gap("Memory", f"{format_bytes(needed)} needed on a rank that may fill {have}"))
    if it.plan.target == "cpu":
        gaps.append(
            Gap("Target", "the plan is for CPU workers, the options are those of GPU builds")
        )
    gaps.append(
        Gap("The promise", "requests are admitted and ordered without asking what they will take")
    )
    return gaps


def _weights_bytes(it: Subject) -> int:
    """Weights on a rank of the fullest stage, cut over the plan's tp alone, whatever helix saves."""
    spec, plan, layout = it.spec, it.plan, it.plan.layout
    if not layout.helix:
        return plan.memory.weights_bytes
    item = ITEMSIZE[DTYPE_NAMES[plan.dtype]]
    layer = spec.hidden * (spec.num_heads * spec.head_dim + 3 * spec.ffn) * item
    saved = layer // layout.tp - layer // (layout.tp * layout.kvp)
    return plan.memory.weights_bytes + max(it.split) * saved


def _kv_bytes(it: Subject, tp: int, shards: int) -> int:
    """KV of the promised requests on a rank of the fullest stage, cut in `shards` along the sequence."""
    plan, kv_heads = it.plan, it.spec.num_kv_heads
    tokens = _in_pages(-(-_promised_tokens(it) // shards) + plan.page_size - 1, plan.page_size)
    planned = plan.promised_pages * plan.page_size * max(1, kv_heads // plan.layout.tp)
    return plan.memory.kv_bytes * tokens * max(1, kv_heads // tp) // planned


def _promised_tokens(it: Subject) -> int:
    """Of all the promised requests, each in whole pages."""
    page = it.plan.page_size
    return it.at_once * page * -(-it.tokens // page)


def _pool_tokens(it: Subject) -> int:
    """What the KV pool holds where each rank holds requests whole: at least what was planned."""
    return max(_promised_tokens(it), it.plan.promised_pages * it.plan.page_size)


def _smallest(plan: Plan) -> int:
    """The smallest planned chunk; a rest at the end, of less than two chunks, does not count."""
    last = plan.chunks[-1]
    is_rest = len(plan.chunks) > 1 and last.end - last.start < 2 * last.chunk
    return min(rule.chunk for rule in (plan.chunks[:-1] if is_rest else plan.chunks))


def _in_pages(tokens: int, page: int) -> int:
    """Rounded down to whole pages, but one at least."""
    return max(page, tokens // page * page)


def _largest(limit: int, allowed: Callable[[int], bool]) -> int:
    """The largest divisor of `limit` that is allowed; 1 if none is."""
    return next((d for d in range(limit, 1, -1) if limit % d == 0 and allowed(d)), 1)


def _commas(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


NAMES: Mapping[str, str] = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
VERSIONS: Mapping[str, str] = {"vllm": "0.31.0", "sglang": "0.5.23", "trtllm": "1.4.0rc1"}
ENGINES: Mapping[str, Callable[[Subject], Export]] = {
    "vllm": vllm,
    "sglang": sglang,
    "trtllm": trtllm,
}
