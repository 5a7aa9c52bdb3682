"""`mnemoc run`, `verify`, `serve`: a plan at work on this machine; `dashboard`: for watching it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .options import (
    folder,
    json_flag,
    limit_options,
    policy_option,
    prompt_options,
    read_prompt,
    trace_option,
    weights_option,
)

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("directory", type=folder)
@weights_option
@prompt_options
@click.option("--max-tokens", type=int, default=64, show_default=True, metavar="N")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, help="Of the sampling.")
@trace_option
@json_flag
def run(
    directory: Path,
    weights: Path,
    prompt: str | None,
    prompt_file: Path | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    trace_out: Path | None,
    as_json: bool,
) -> None:
    """Run one prompt through a plan, and hold what was measured against what was predicted.

    \b
    Example:
      mnemoc run plan/ --weights models/tiny --prompt-file book.txt --max-tokens 100
    """
    from .codec import to_json
    from .running import run_prompt, summary
    from .runtime import Sampling

    text = read_prompt(prompt, prompt_file)
    sampling = Sampling(temperature=temperature, seed=seed)
    with console.streaming(not as_json) as (write, progress):
        outcome = run_prompt(
            directory,
            weights,
            text,
            max_tokens,
            sampling,
            write=write,
            progress=progress,
            trace_out=trace_out,
        )
    if as_json:
        click.echo(json.dumps(to_json(outcome)))
    else:
        click.echo(summary(outcome), err=True)


@click.command()
@click.argument("directory", type=folder)
@weights_option
@prompt_options
@click.option("--max-tokens", type=int, default=32, show_default=True, metavar="N")
@json_flag
def verify(
    directory: Path,
    weights: Path,
    prompt: str | None,
    prompt_file: Path | None,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Run a plan and the unsharded reference on the same prompt, and compare every logit.

    Without a prompt, a fixed random one that fills the plan's context up to 2,048 tokens.
    Exit code 1 if greedy tokens differ.

    \b
    Example:
      mnemoc verify plan/ --weights models/tiny
    """
    from . import pipeline
    from .codec import to_json

    with console.progress_bar() as progress:
        ids = None
        if prompt is not None or prompt_file is not None:
            from .runtime.tokenizer import Tokenizer

            ids = Tokenizer(weights).encode(read_prompt(prompt, prompt_file))
        result = pipeline.verify(directory, weights, ids, max_tokens, progress)
    if as_json:
        click.echo(json.dumps({**to_json(result), "agrees": result.agrees}))
    else:
        click.echo(result.sentence)
    if not result.agrees:
        sys.exit(console.EXIT_FAULT)


@click.command()
@click.argument("directory", type=folder)
@weights_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@policy_option
@click.option(
    "--prefix-caching/--no-prefix-caching",
    default=True,
    show_default=True,
    help="Share the KV pages of common beginnings.",
)
@click.option(
    "--strict-slo",
    is_flag=True,
    help="Refuse requests whose first token would come later than promised.",
)
@click.option(
    "--control",
    metavar="tcp://HOST:PORT",
    help="Wait here for workers that torchrun starts, on any number of hosts (docs/deploying.md).",
)
@trace_option
@click.option(
    "--step-timeout",
    "step_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="A step that takes longer, and ten times what was predicted, hangs: workers start afresh.",
)
@click.option(
    "--drain-timeout",
    "drain_s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="After Ctrl-C or SIGTERM, how long requests may still take.",
)
@click.option(
    "--chat-template",
    type=folder,
    metavar="FILE",
    help="In place of the model's own.",
)
@limit_options
@click.option(
    "--log-format",
    type=click.Choice(["text", "json", "none"]),
    default="text",
    show_default=True,
    callback=lambda context, option, value: None if value == "none" else value,
    help="A line for each event.",
)
@click.option("--log-file", type=click.Path(path_type=Path), help="Instead of stderr.")
@click.option("--otlp-endpoint", metavar="URL", help="Send traces to this OpenTelemetry collector.")
def serve(
    directory: Path,
    weights: Path,
    host: str,
    port: int,
    chat_template: Path | None,
    **chosen: Any,
) -> None:
    """Serve a plan with an OpenAI-compatible API, until Ctrl-C or SIGTERM.

    \b
    Example:
      mnemoc serve plan/ --weights models/tiny --port 8000
    """
    from . import chat
    from .runtime import server

    options = server.Options(**chosen)
    template = chat.load(weights, chat_template)
    server.serve(
        directory, weights, host, port, options, template=template, progress=console.remark
    )


@click.command()
def dashboard() -> None:
    """Write a Grafana dashboard for what `mnemoc serve` tells Prometheus.

    \b
    Example:
      mnemoc dashboard > grafana/dashboards/mnemoc.json
    """
    from .runtime.server.dashboard import dashboard as made

    click.echo(made())
