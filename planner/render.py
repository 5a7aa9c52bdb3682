"""The plan on one screen: what it is, whether it keeps the promise, why, and what next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..artifact import ChunkRule, Plan, Workload
from ..units import format_bytes, format_count, format_duration
from ..wording import devices_word, dtypes, growth_words, memory_parts, room_words, what_ifs
from .render_frontier import render_frontier

_COLOURS = {
    "linear": "cyan",
    "attention": "magenta",
    "communication": "yellow",
    "launch": "blue",
    "other": "white",
    "bubble": "red",
}
_BAR = 32
_RULES = 8


def render_plan(
    model: str,
    cluster: str,
    workload: Workload,
    plan: Plan,
    out: Path | None = None,
    *,
    pareto: bool = False,
) -> RenderableType:
    """The whole screen, for `rich.console.Console.print`. Takes nothing but what a manifest holds.

    pareto: with the frontier, where the plan has one.
    """
    body: list[RenderableType] = [
        _layout(plan),
        _promises(workload, plan),
        Text(),
        _parts(plan),
        Text(),
        _chunks(workload, plan),
    ]
    if plan.alternatives:
        body += [Text(), _alternatives(plan)]
    if plan.marginals:
        body += [Text(), _marginals(plan)]
    if pareto and plan.frontier is not None:
        body += [Text(), render_frontier(plan.frontier, workload, plan.layout)]
    body += [Text(), Rule("why", style="dim", align="left"), *_notes(plan)]
    body += [Rule("what next", style="dim", align="left"), _next(plan, out)]
    title = (
        f"[bold]{model}[/] on [bold]{cluster}[/], {format_count(workload.context)} tokens of context"
        f" + {format_count(workload.output_tokens)} of output, {workload.concurrency} at once"
    )
    return Panel(Group(*body), title=title, title_align="left", border_style="dim", padding=(1, 2))


def _layout(plan: Plan) -> Text:
    layout = plan.layout
    device = "worker" if plan.target == "cpu" else "GPU"
    text = Text()
    text.append(f"{plan.gpus} {device}{'s' if plan.gpus != 1 else ''}", style="bold green")
    text.append(" = ")
    for i, (name, degree) in enumerate(
        (("TP", layout.tp), ("SPP", layout.spp), ("KVP", layout.kvp))
    ):
        text.append(f"{' × ' if i else ''}{degree} ", style="bold")
        text.append(name, style="dim")
    if layout.helix:
        text.append("   FFN over TP × KVP (helix)", style="dim")
    text.append(f"   layers per stage {_counts([s.num_layers for s in plan.stages])}", style="dim")
    text.append(f"   {dtypes(plan.dtype, plan.precision)}, {plan.target}", style="dim")
    return text


def _counts(layers: list[int]) -> str:
    """[7, 7, 6, 6] → "7·2 6·2"."""
    runs: list[list[int]] = []
    for count in layers:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return " ".join(f"{count}×{times}" if times > 1 else str(count) for count, times in runs)


def _promises(workload: Workload, plan: Plan) -> Table:
    table = Table.grid(padding=(0, 3))
    said, memory = plan.predicted, plan.memory
    used, room = memory.promised_bytes, memory.room_bytes
    parts = [f"{name} {format_bytes(size)}" for name, size in memory_parts(memory).items()]
    for name, got, limit, share, detail in (
        ("TTFT", format_duration(said.ttft_s), format_duration(workload.ttft_s),
         said.ttft_s / workload.ttft_s, "time to first token"),
        ("TBT", format_duration(said.tbt_s), format_duration(workload.tbt_s),
         said.tbt_s / workload.tbt_s, f"{said.throughput_tokens_per_s:,.0f} tokens/s in decode"),
        ("memory", format_bytes(used), format_bytes(memory.capacity_bytes),
         used / memory.capacity_bytes,
         ", ".join(parts)),
    ):  # fmt: skip
        table.add_row(
            Text(name, style="bold"),
            Text(got, style="bold green", justify="right"),
            Text(f"of {limit}", style="dim"),
            _gauge(share),
            Text(detail, style="dim"),
        )
    if room:
        table.add_row(
            Text("room", style="bold"),
            Text(format_bytes(room), style="bold", justify="right"),
            Text("for more", style="dim"),
            _gauge(room / memory.capacity_bytes),
            Text(room_words(plan), style="dim"),
        )
    return table


def _gauge(share: float) -> Text:
    filled = min(20, max(0, round(20 * share)))
    return Text("━" * filled, style="green") + Text("─" * (20 - filled), style="dim")


def _parts(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 3))
    for name, parts in (
        ("TTFT", plan.predicted.ttft_parts_s),
        ("TBT", plan.predicted.tbt_parts_s),
    ):
        table.add_row(Text(f"{name} by part", style="bold"), _bar(parts), _legend(parts))
    return table


def _bar(parts: Mapping[str, float]) -> Text:
    total = sum(parts.values()) or 1.0
    text = Text()
    for name, seconds in parts.items():
        text.append("█" * round(_BAR * seconds / total), style=_COLOURS.get(name, "white"))
    return text


def _legend(parts: Mapping[str, float]) -> Text:
    total = sum(parts.values()) or 1.0
    text = Text()
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        if seconds / total >= 0.005:
            text.append(f"{name} {seconds / total:.0%}  ", style=_COLOURS.get(name, "white"))
    return text


def _chunks(workload: Workload, plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("cached tokens")
    for column in ("chunk", "groups", "iteration"):
        table.add_column(column, justify="right")
    table.add_column("")
    rules = _few(plan.chunks)
    longest = max(rule.chunk for rule in plan.chunks)
    for rule in rules:
        table.add_row(
            f"{format_count(rule.start)} – {format_count(rule.end)}",
            f"{rule.chunk:,}",
            str(rule.groups),
            format_duration(rule.iteration_s),
            Text("▇" * max(1, round(_BAR * rule.chunk / longest)), style="cyan"),
        )
    notes = []
    if len(rules) < len(plan.chunks):
        notes.append(f"{len(rules)} of {len(plan.chunks)} steps")
    if plan.layout.kvp > 1:
        tokens = workload.context + workload.output_tokens
        notes.append(f"a request {growth_words(plan.layout.kvp, plan.stripe_tokens, tokens)}")
    if notes:
        table.caption, table.caption_justify = "; ".join(notes), "left"
    return table


def _few(rules: tuple[ChunkRule, ...]) -> list[ChunkRule]:
    """At most _RULES of them, the first and the last among them."""
    if len(rules) <= _RULES:
        return list(rules)
    step = (len(rules) - 1) / (_RULES - 1)
    return [rules[round(i * step)] for i in range(_RULES)]


def _alternatives(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("instead")
    for column in (devices_word(plan), "TTFT", "TBT"):
        table.add_column(column, justify="right")
    table.add_column("why not")
    for other in plan.alternatives:
        table.add_row(
            str(other.layout),
            str(other.gpus),
            format_duration(other.ttft_s) if other.ttft_s > 0 else "–",
            format_duration(other.tbt_s),
            Text(other.reason, style="dim"),
        )
    return table


def _marginals(plan: Plan) -> Table:
    """A row per figure that moves: the laxer question (or more devices), the stricter one."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    for column in ("what if", "laxer", "stricter"):
        table.add_column(column)
    for change, cells in what_ifs(plan).items():
        table.add_row(
            change, *(Text(c, style="dim" if c.endswith("no plan") else "") for c in cells)
        )
    return table


def _notes(plan: Plan) -> list[Text]:
    proven = plan.optimality
    lines = [
        *plan.notes,
        f"Proven optimal in {proven.minimised} to a gap of {proven.gap:.2%} "
        f"(objective {proven.objective:.6g}, bound {proven.bound:.6g}).",
    ]
    return [Text("• ", style="dim") + Text(line) for line in lines]


def _next(plan: Plan, out: Path | None) -> Text:
    if out is None:
        return Text("add -o DIR to write the plan with its kernels and programs", style="cyan")
    text = Text()
    for command, what in (
        (f"mnemoc show {out} report --open", "see it"),
        (f"mnemoc verify {out} --weights DIR", "check it against the unsharded model"),
        (f"mnemoc serve {out} --weights DIR", "serve it"),
    ):
        text.append(f"{command}", style="cyan")
        text.append(f"   {what}\n", style="dim")
    text.rstrip()
    return text
