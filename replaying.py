"""`mnemoc replay`: one rank of a plan alone on this machine, and what it measured as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import console
from .options import chunk_size, count, folder, json_flag
from .units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from .runtime.measuring.replay import Held, Measured, Outcome


@click.command()
@click.argument("directory", type=folder)
@click.option("--rank", type=int, required=True, metavar="R", help="Which of the plan's ranks.")
@click.option(
    "--weights", type=folder, metavar="DIR", help="Hugging Face model folder; random otherwise."
)
@click.option("--prompt", callback=count, metavar="TOKENS", help="The plan's context by default.")
@click.option(
    "--cached", callback=count, metavar="TOKENS", help="Only the chunk that follows so many."
)
@click.option(
    "--chunk", callback=chunk_size, default="auto", show_default=True, metavar="auto|TOKENS"
)
@click.option(
    "--decodes",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    metavar="N",
    help="Requests that decode together behind the prompt.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    metavar="N",
    help="Chunks to measure, evenly along the prompt.",
)
@click.option("--pages", type=click.IntRange(1), metavar="N", help="As many as needed by default.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and data.")
@json_flag
def replay(
    directory: Path,
    rank: int,
    weights: Path | None,
    prompt: int | None,
    cached: int | None,
    chunk: int | None,
    decodes: int,
    steps: int,
    pages: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run one rank of a plan alone, and hold what was measured against what was predicted.

    One device is enough for any rank of any plan: what the other ranks would send is made here, and
    the time of messages is left out on both sides.

    \b
    Example:
      mnemoc replay plan/ --rank 17 --prompt 1M
    """
    import torch

    from .codec import to_json
    from .runtime.measuring.replay import Replay, threads
    from .runtime.measuring.walk import Asked

    torch.set_num_threads(threads())
    asked = Asked(rank, weights, prompt, cached, chunk, decodes, steps, pages, seed)
    with console.progress_bar() as progress, Replay.open(directory, asked, progress) as rank_alone:
        outcome = rank_alone.run(progress)
    if as_json:
        click.echo(json.dumps(to_json(outcome)))
    else:
        click.echo("\n".join(tell(outcome)))


def tell(outcome: Outcome) -> Iterator[str]:
    """A replay line by line."""
    layout = outcome.layout
    yield (
        f"rank {outcome.rank} of {layout.gpus} ({layout}): stage {outcome.stage}, KVP group "
        f"{outcome.group}, tp rank {outcome.tp_rank}"
    )
    prompt = f"{format_count(outcome.prompt)} tokens of prompt"
    yield f"alone on {outcome.device}, weights {outcome.weights}; {prompt}"
    yield ""
    columns = (
        f"{'rows':>8}{'after':>9}{'measured':>12}{'predicted':>12}{'error':>8}{'messages':>12}"
    )
    yield f"  {'':<8}{columns}"
    for one in outcome.micro_batches:
        yield _line(one)
    yield ""
    yield (
        f"predicted over measured: median error {outcome.median_error:.0%}, worst "
        f"{outcome.worst_error:.0%}; messages between ranks are in neither, the last column is the plan's"
    )
    yield from _memory(outcome.memory)


def _line(one: Measured) -> str:
    batch = one.batch
    return (
        f"  {batch.kind:<8}{batch.rows:>8,}{format_count(batch.cached):>9}"
        f"{format_duration(one.measured_s):>12}{format_duration(one.predicted_s):>12}"
        f"{one.error:>+8.0%}{format_duration(one.messages_s):>12}"
    )


def _memory(held: Held) -> Iterator[str]:
    planned = held.planned
    yield "memory, beside what the plan says of its fullest rank:"
    yield f"  weights {format_bytes(held.weights_bytes)} ({format_bytes(planned.weights_bytes)})"
    yield (
        f"  KV {format_bytes(held.kv_bytes)} in {held.pages:,} pages "
        f"({format_bytes(planned.kv_bytes)} in {held.planned_pages:,})"
    )
    if held.step_bytes is not None:
        step = planned.activation_bytes + planned.workspace_bytes + planned.communication_bytes
        yield f"  a step {format_bytes(held.step_bytes)} at most ({format_bytes(step)})"
