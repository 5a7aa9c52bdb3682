"""Other people's kernels behind our ops: who can serve `attend` in a plan, and who does.

A provider's contract says what it takes: pages of which sizes, element types, architectures. Where a cluster
file holds measured speeds (`speeds`) of mnemoc's own kernel and of providers whose contract suffices, the
plan has the fastest, over the chunks that it plans, each weighed by its work. Without measurements it has our
own. A provider's module has the names and the contract of ours, and calls the provider; where that is not
installed it fails with a sentence, as it is loaded.

What no provider can express is a query's bound other than that of its segment's last key. So only plans with
one KVP group, whose chunks are all causal to their end, may have their prefill provided.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..artifact import FP8, Plan, Workload
from ..errors import BadInput
from ..speeds import KernelSpeeds, Speeds
from .kernels import KernelSpec
from .templating import render

OURS = "triton"
OPS = ("attention_prefill", "attention_decode")
REPORT = "kernels/providers.json"

_HALVES = ("bfloat16", "float16")
_AMPERE = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Provider:
    """What a provider takes. All serve grouped queries, and segments of different lengths in one call.

    title: its name among people; needs: what must be installed, in pip's words
    pages: the page sizes it takes are multiples of this; None: it takes no pages
    """

    title: str
    needs: str
    architectures: tuple[str, ...]
    pages: int | None
    dtypes: tuple[str, ...] = _HALVES

    def lacks(self, op: str, spec: KernelSpec, plan: Plan) -> str | None:
        """Why it cannot serve the op in this plan; None if it can."""
        arch = spec.target.partition(":")[2]
        if arch not in self.architectures:
            return f"it has no kernels for {spec.target}"
        if self.pages is None:
            return "it takes keys and values in one piece, and ours lie in pages"
        if spec.page_size % self.pages:
            return (
                f"its pages are multiples of {self.pages} tokens, the plan's have {spec.page_size}"
            )
        if spec.dtype not in self.dtypes:
            return f"it does not compute in {spec.dtype}"
        if plan.precision.kv_cache == FP8:
            return "it reads keys in fp8 only for queries in fp8"
        if op == "attention_prefill" and plan.layout.kvp > 1:
            return "it knows no queries that are causal on one KVP group and see all on another"
        return None


PROVIDERS: Mapping[str, Provider] = {
    # From their documentation and checks: flash_attn_interface.py and, for page sizes,
    # csrc/flash_attn/flash_api.cpp; hopper/flash_attn_interface.py. torch.nn.attention.varlen takes
    # pages through FlashAttention-3 only (pytorch/pytorch pull request 175924), which is here itself.
    "flash_attn": Provider("flash-attn", "flash-attn>=2.7", _AMPERE, 256),
    "flash_attn_3": Provider("FlashAttention-3", "FlashAttention's hopper/", ("sm_90",), 1),
    "torch_flash": Provider("PyTorch's flash attention", "torch", (*_AMPERE, "sm_100"), None),
    "cudnn": Provider("cuDNN's attention", "torch", (*_AMPERE, "sm_100"), None),
}


@dataclass(frozen=True)
class Use:
    """How much of an op's work a plan does at a size.

    size, keys: as in `Speeds`; work: FLOP or bytes, relative to other uses of the op
    """

    size: float
    keys: float
    work: float


@dataclass(frozen=True)
class Choice:
    """Who serves an op. speedup: over mnemoc's own, by the measurements (1 where that is chosen).

    refused: providers that were measured and cannot serve this plan, with the reason
    """

    op: str
    provider: str
    speedup: float
    refused: Mapping[str, str]


def choose(
    op: str, spec: KernelSpec, plan: Plan, uses: Sequence[Use], speeds: KernelSpeeds
) -> Choice:
    """The fastest that can serve the op, over what the plan uses it for; mnemoc's own without measurements.

    All are compared at sizes at which all were measured, the nearest to each use. BadInput: a provider
    that nobody knows.
    """
    measured = speeds.get(op, {})
    if unknown := sorted(measured.keys() - PROVIDERS.keys() - {OURS}):
        known = ", ".join((OURS, *PROVIDERS))
        raise BadInput(f"kernels.{op}.{unknown[0]}: no such provider", do=f"known ones: {known}")
    others = {name: PROVIDERS[name].lacks(op, spec, plan) for name in measured if name != OURS}
    refused = {name: why for name, why in others.items() if why is not None}
    able = {name: table for name, table in measured.items() if name not in refused}
    seconds = _seconds(able, uses) if OURS in able else {}
    best = min(seconds, key=lambda name: (seconds[name], name != OURS), default=OURS)
    speedup = seconds[OURS] / seconds[best] if seconds else 1.0
    return Choice(op, best, speedup, refused)


def _seconds(tables: Mapping[str, Speeds], uses: Sequence[Use]) -> dict[str, float]:
    """By provider, the time of all uses (relative); {} where nothing was measured of all."""
    at = {
        name: {(size, keys): speed for size, keys, speed in t.points} for name, t in tables.items()
    }
    common = sorted(set.intersection(*(set(points) for points in at.values())))
    if not common:
        return {}

    def far(point: tuple[float, float], use: Use) -> float:
        return abs(math.log(point[0] / use.size)) + abs(math.log(point[1] / use.keys))

    nearest = [min(common, key=lambda point: far(point, use)) for use in uses]
    return {
        name: sum(use.work / points[near] for use, near in zip(uses, nearest, strict=True))
        for name, points in at.items()
    }


def uses_of(op: str, spec: KernelSpec, plan: Plan, workload: Workload) -> list[Use]:
    """Where a plan uses an op: prefill in each of its chunk sizes over its context; decode at its end."""
    if op == "attention_decode":
        return [Use(workload.concurrency, workload.context, 1.0)]
    uses = []
    for rule in plan.chunks:
        end = min(rule.end, workload.context)
        if rule.start < end:
            middle = (rule.start + end) / 2
            uses.append(Use(rule.chunk * spec.group, middle, (end - rule.start) * middle))
    return uses


def provide(
    spec: KernelSpec, plan: Plan, workload: Workload, speeds: KernelSpeeds
) -> dict[str, str]:
    """Files in place of our own kernels, where a provider is chosen, and what was weighed; {} unmeasured."""
    if not speeds or spec.target == "cpu":
        return {}
    files, choices = {}, []
    for op in OPS:
        choice = choose(op, spec, plan, uses_of(op, spec, plan, workload), speeds)
        choices.append(choice)
        if choice.provider != OURS:
            files[f"kernels/{op}.py"] = render_provider(choice, spec)
    report = [asdict(choice) for choice in choices]
    return {**files, REPORT: json.dumps(report, indent=1, sort_keys=True) + "\n"}


def render_provider(choice: Choice, spec: KernelSpec) -> str:
    """The module by which a provider that takes pages serves an op."""
    provider = PROVIDERS[choice.provider]
    return render(
        f"providers/{choice.provider}.py.j2",
        op=choice.op,
        title=provider.title,
        needs=provider.needs,
        speedup=choice.speedup,
        causal=choice.op == "attention_prefill",
        **{**vars(spec), "group": spec.group, "scale": spec.head_dim**-0.5},
    )
