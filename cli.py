"""The command line: thin. It reads options, calls `pipeline` or `runtime`, prints what they give.

Results go to stdout, progress and remarks to stderr. Exit codes: 0 done, 1 our fault, 2 usage,
3 infeasible, 4 bad input, 130 interrupted. Each command imports what it needs when it runs, so that
`mnemoc --help` is instant and `mnemoc plan` loads no torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import click

from . import console
from .errors import MnemocError, UsageError
from .units import format_bytes, parse_count, parse_duration_s

EMITTABLE = ("ir", "plan", "kernels", "schedule")
OBJECTIVES = ("gpus", "ttft", "throughput")
AXES = ("tp", "spp", "kvp")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code. MNEMOC_DEBUG=1 shows tracebacks."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with cli.make_context("mnemoc", words) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(console.EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and console.stdout_is_gone():
            console.silence_stdout()
            sys.exit(console.EXIT_BROKEN_PIPE)
        if os.environ.get("MNEMOC_DEBUG"):
            raise
        sys.exit(_report(error, as_json="--json" in words))
    sys.exit(0)


def _report(error: Exception, *, as_json: bool) -> int:
    if isinstance(error, MnemocError):
        console.report(error, as_json=as_json)
        return error.exit_code
    sentence = f"internal error: {type(error).__name__}: {error}"
    print(f"mnemoc: {sentence}; MNEMOC_DEBUG=1 shows where", file=sys.stderr)
    return console.EXIT_FAULT


# ------------------------------------------------------- what options mean (click calls these back)


def count(_context: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A positive count: 4096, 128K, 10M."""
    return None if value is None else parse_count(value, param.opts[0])


def duration(_context: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A positive duration with its unit: 400s, 30ms."""
    return None if value is None else parse_duration_s(value, param.opts[0])


def pins(_context: click.Context, param: click.Parameter, value: str | None) -> dict[str, int]:
    """Degrees to pin: tp=8,spp=4,kvp=4 or a part of it."""
    result: dict[str, int] = {}
    for item in value.split(",") if value else ():
        axis, _, degree = item.strip().partition("=")
        if axis not in AXES or axis in result or not degree.isdecimal() or int(degree) < 1:
            raise UsageError(
                "not a layout", where=param.opts[0], got=value, do="write tp=8,spp=4,kvp=4"
            )
        result[axis] = int(degree)
    return result


def emitted(_context: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Stages of the flow to write: ir,plan,kernels,schedule or a part of it."""
    stages = tuple(value.split(",")) if value else ()
    if unknown := [stage for stage in stages if stage not in EMITTABLE]:
        known = ", ".join(EMITTABLE)
        raise UsageError(
            f"unknown stage {unknown[0]!r}", where=param.opts[0], do=f"stages: {known}"
        )
    return stages


folder = click.Path(path_type=Path)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mnemoc", message="mnemoc %(version)s")
def cli() -> None:
    """A compiler for long-context LLM serving: from a model, a cluster and a promise to tokens."""


@cli.command()
@click.argument("model")
@click.option(
    "--cluster", required=True, metavar="NAME|FILE", help="A shipped one, or a TOML file."
)
@click.option("--nodes", type=click.IntRange(1), help="Nodes to use at most.")
@click.option("--gpus", type=click.IntRange(1), help="GPUs (ranks) to use at most.")
@click.option("--context", callback=count, required=True, metavar="TOKENS", help="Such as 10M.")
@click.option("--output-tokens", callback=count, default="256", show_default=True, metavar="TOKENS")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True)
@click.option("--ttft", callback=duration, required=True, metavar="TIME", help="Such as 400s.")
@click.option("--tbt", callback=duration, required=True, metavar="TIME", help="Such as 30ms.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="gpus", show_default=True)
@click.option("--target", metavar="TARGET", help="cuda:sm_90, cpu, ...: the cluster's by default.")
@click.option("--layout", callback=pins, metavar="tp=T,spp=P,kvp=K", help="Degrees to pin.")
@click.option("--emit", callback=emitted, metavar=",".join(EMITTABLE), help="Print these stages.")
@click.option("-o", "--out", type=folder, metavar="DIR", help="Write the plan as an artifact.")
@json_flag
def plan(
    model: str,
    cluster: str,
    nodes: int | None,
    gpus: int | None,
    context: int,
    output_tokens: int,
    concurrency: int,
    ttft: float,
    tbt: float,
    objective: str,
    target: str | None,
    layout: dict[str, int],
    emit: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Plan how MODEL is served on a cluster so that the promise is kept, and say why.

    MODEL is a preset, a model folder or a config.json.

    \b
    Example:
      mnemoc plan llama-3-8b --cluster dgx-h100 --nodes 16 --context 10M \\
          --ttft 600s --tbt 30ms -o plan/
    """
    from . import pipeline
    from .artifact import Workload

    if nodes is not None and gpus is not None:
        raise UsageError("--nodes and --gpus exclude each other", do="give one of them")
    workload = Workload(context, ttft, tbt, output_tokens, concurrency, objective)
    with console.progress_bar() as progress:
        progress("planning")
        planned = pipeline.plan(
            model, cluster, workload, nodes=nodes, gpus=gpus, target=target, pinned=layout
        )
        files = pipeline.dump(planned, emit, progress) if emit else {}
        if out is not None:
            pipeline.emit(planned, out, progress)
    if as_json:
        click.echo(json.dumps(pipeline.describe(planned) | ({"files": files} if emit else {})))
    elif emit:
        for name, text in files.items():
            click.echo(f"# {name}")
            console.print_source(text, name)
    else:
        console.print_plan(
            planned.spec.name, planned.cluster.name, planned.workload, planned.plan, out
        )


@cli.command()
@click.argument("directory", type=folder)
@click.argument("what", nargs=-1)
def show(directory: Path, what: tuple[str, ...]) -> None:
    """Show what a plan holds: plan, ir, schedule, kernel NAME, or a FILE of it.

    \b
    Example:
      mnemoc show plan/ kernel attention_prefill
    """
    from . import artifact

    manifest, contents = artifact.load(directory)
    if what in ((), ("plan",)):
        console.print_manifest(manifest)
        return
    for name in _wanted(contents, what):
        if len(what) == 1 and what[0] != name:
            click.secho(f"# {name}", dim=True)
        console.print_source(_text(contents[name], name), name)


def _wanted(contents: Mapping[str, bytes], what: tuple[str, ...]) -> list[str]:
    """The files of an artifact that `show` was asked for."""
    if what[0] in ("ir", "schedule") and len(what) == 1:
        return sorted(name for name in contents if name.startswith(f"{what[0]}/"))
    kernels = [Path(name).stem for name in contents if re.fullmatch(r"kernels/[a-z]\w*\.py", name)]
    if what[0] == "kernel":
        if len(what) == 2 and what[1] in kernels:
            return [f"kernels/{what[1]}.py"]
        raise UsageError("name one kernel", do=f"kernels: {', '.join(sorted(kernels))}")
    if len(what) == 1 and what[0] in contents:
        return [what[0]]
    raise UsageError(
        f"the plan holds no {' '.join(what)!r}",
        do="ask for plan, ir, schedule, kernel NAME or one of " + ", ".join(sorted(contents)),
    )


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError("not text", where=name, do="open it with a disassembler") from error


@cli.command("init-model")
@click.argument("model")
@click.argument("directory", type=folder)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same weights.")
@click.option("--max-shard-size", callback=count, default="2G", show_default=True, metavar="BYTES")
@json_flag
def init_model(model: str, directory: Path, seed: int, max_shard_size: int, as_json: bool) -> None:
    """Write a random-weight model in Hugging Face form.

    MODEL is a preset, a model folder or a config.json; its shapes are taken, not its weights.

    \b
    Example:
      mnemoc init-model tiny-llama models/tiny --seed 1
    """
    from .ir.model import load_model, read_config
    from .runtime.init_model import Blueprint
    from .runtime.init_model import init_model as write

    spec, config = load_model(model), read_config(model)
    blueprint = Blueprint(config, spec.tensors(), spec.dtype, spec.vocab, spec.bos, spec.eos)
    with console.progress_bar() as progress:
        write(blueprint, directory, seed=seed, max_shard_bytes=max_shard_size, progress=progress)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "bytes": size, "seed": seed}))
    else:
        click.echo(f"{directory}: {spec.architecture}, {format_bytes(size)}, seed {seed}")
