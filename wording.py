"""What the terminal and the report say in the same words."""

from __future__ import annotations

from .alternatives import Marginal
from .artifact import FP8, Memory, Plan, Precision
from .units import format_count, format_duration

_PARTS = {"kv": "KV", "activation": "activations"}
_CHANGES = {"ttft": "TTFT", "tbt": "TBT", "node": "one node", "device": "one device"}


def devices_word(plan: Plan) -> str:
    """What the plan's ranks run on, as a plural."""
    return "workers" if plan.target == "cpu" else "GPUs"


def memory_parts(held: Memory) -> dict[str, int]:
    """What fills a rank, in words; what takes nothing is left out."""
    return {_PARTS.get(name, name): size for name, size in held.parts.items() if size}


def room_words(plan: Plan) -> str:
    """What memory has room for, the promise and more."""
    tokens = plan.num_pages * plan.page_size * plan.layout.kvp
    return f"{format_count(tokens)} tokens of KV, {plan.max_batch:,} decodes at once"


def dtypes(dtype: str, precision: Precision) -> str:
    """ "bfloat16 with fp8 weights and KV cache"."""
    kept = (("weights", precision.weights), ("KV cache", precision.kv_cache))
    named = " and ".join(name for name, value in kept if value == FP8)
    return f"{dtype} with fp8 {named}" if named else dtype


def growth_words(kvp: int, stripe_tokens: int, tokens: int) -> str:
    """How a request of so many tokens comes to lie on its KVP groups: what follows "a request"."""
    if kvp * stripe_tokens < tokens:
        return f"is dealt to {kvp} groups, {stripe_tokens:,} tokens at a time"
    return f"takes on its next group after {stripe_tokens:,} tokens"


def what_ifs(plan: Plan) -> dict[str, list[str]]:
    """By the figure that moves: what the laxer question (or more devices) gives, then the stricter one."""
    rows: dict[str, list[str]] = {}
    for marginal in plan.marginals:
        rows.setdefault(_CHANGES[marginal.change], []).append(_moved(marginal, plan))
    return rows


def _moved(marginal: Marginal, plan: Plan) -> str:
    """ "33 s → 112 GPUs (−16)"."""
    devices = devices_word(plan)
    asked = {
        "ttft": format_duration(marginal.ttft_s or 0.0),
        "tbt": format_duration(marginal.tbt_s),
    }.get(marginal.change, f"{marginal.gpus} {devices}")
    value, point, before = marginal.objective, marginal.point, marginal.before
    if value is None or point is None:
        return f"{asked} → no plan"
    if marginal.minimised == "gpus" and value == before:
        share = point.ttft_s / plan.predicted.ttft_s - 1
        moved = f"still {value:.0f} {devices}"
        moved += f", TTFT {_signed(share, '.0%')}" if abs(share) >= 0.005 else ""
    elif marginal.minimised == "gpus":
        moved = f"{value:.0f} {devices} ({_signed(value - before, '.0f')})"
    elif marginal.minimised == "ttft":
        moved = f"TTFT {format_duration(value)} ({_change(value, before)})"
    else:
        moved = f"{value:,.0f} tokens/s ({_change(value, before)})"
    return f"{asked} → {moved}"


def _change(value: float, before: float) -> str:
    share = value / before - 1
    return "same" if abs(share) < 0.0005 else _signed(share, ".1%")


def _signed(value: float, form: str) -> str:
    """With a sign as wide as a digit."""
    return f"{value:+{form}}".replace("-", "−")
