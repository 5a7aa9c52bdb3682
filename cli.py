"""The command line: thin. It reads options, calls `pipeline` or `runtime`, prints what they give.

Results go to stdout, progress and remarks to stderr. Exit codes: 0 done, 1 our fault, 2 usage,
3 infeasible, 4 bad input, 130 interrupted, 143 terminated. Each command imports what it needs when it
runs, so that `mnemoc --help` is instant and `mnemoc plan` loads no torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from . import console
from .errors import Infeasible, MnemocError, UsageError
from .inspection import export, show
from .options import (
    EMITTABLE,
    OBJECTIVES,
    calibrate_option,
    chunk_size,
    count,
    duration,
    eager_option,
    emitted,
    folder,
    json_flag,
    measure_if_local,
    pins,
    precision_options,
    warn_if_disturbed,
)
from .replaying import replay
from .serving import dashboard, run, serve, verify
from .simulating import simulate
from .units import format_bytes


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code. MNEMOC_DEBUG=1 shows tracebacks."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with console.terminable(), cli.make_context("mnemoc", words) as context:
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
@click.option(
    "--layout",
    callback=pins,
    metavar="tp=T,spp=P,...",
    help="Pin tp, spp, kvp, ffn, stripe, overlap, all_reduce.",
)
@precision_options
@eager_option
@calibrate_option
@click.option("--emit", callback=emitted, metavar=",".join(EMITTABLE), help="Print these stages.")
@click.option("--pareto", is_flag=True, help="Also the frontier of GPUs, TTFT and TBT.")
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
    layout: dict[str, int | str],
    quantization: str | None,
    kv_cache_dtype: str,
    enforce_eager: bool,
    calibrate: bool,
    emit: tuple[str, ...],
    pareto: bool,
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
    from .artifact import Precision, Workload

    if nodes is not None and gpus is not None:
        raise UsageError("--nodes and --gpus exclude each other", do="give one of them")
    workload = Workload(context, ttft, tbt, output_tokens, concurrency, objective)
    precision = Precision(quantization or "auto", kv_cache_dtype)
    with console.progress_bar() as progress:
        measure_if_local(cluster, calibrate and not precision.fp8, progress)
        progress("planning")
        try:
            with console.uncollected():
                planned = pipeline.plan(
                    model,
                    cluster,
                    workload,
                    nodes=nodes,
                    gpus=gpus,
                    target=target,
                    pinned=layout,
                    precision=precision,
                    eager=enforce_eager,
                    pareto=pareto or out is not None,
                )
        except Infeasible as error:
            if pareto and error.frontier is not None and not as_json:
                console.print_frontier(error.frontier, workload)
            raise
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
        names = (planned.spec.name, planned.cluster.name)
        console.print_plan(*names, planned.workload, planned.plan, out, pareto=pareto)


@cli.command()
@click.argument("model")
@click.option(
    "--cluster", required=True, metavar="NAME|FILE", help="A shipped one, or a TOML file."
)
@click.option(
    "--layout",
    callback=pins,
    metavar="tp=T,spp=P,kvp=K",
    help="1 by default; also ffn, stripe, overlap, all_reduce.",
)
@click.option(
    "--cp", type=click.IntRange(1), default=1, help="Ring attention over N ranks instead."
)
@click.option("--prompt", callback=count, required=True, metavar="TOKENS", help="Such as 1M.")
@click.option(
    "--cached", callback=count, metavar="TOKENS", help="Before the prompt, prefilled already."
)
@click.option("--output", callback=count, default="256", show_default=True, metavar="TOKENS")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--chunk", callback=chunk_size, default="auto", show_default=True, metavar="auto|TOKENS"
)
@precision_options
@eager_option
@calibrate_option
@json_flag
def predict(
    model: str,
    cluster: str,
    layout: dict[str, int | str],
    cp: int,
    prompt: int,
    cached: int | None,
    output: int,
    concurrency: int,
    chunk: int | None,
    quantization: str | None,
    kv_cache_dtype: str,
    enforce_eager: bool,
    calibrate: bool,
    as_json: bool,
) -> None:
    """Predict what a pinned configuration does: TTFT, TBT, throughput, memory, and how sure that is.

    TTFT is that of one prompt that has the engine to itself, TBT that of all requests decoding together.

    \b
    Example:
      mnemoc predict llama-3-8b --cluster dgx-h100 --layout tp=8,spp=4,kvp=2 --prompt 1M
    """
    from . import pipeline
    from .artifact import Precision
    from .codec import from_json, to_json
    from .layout import Layout
    from .planner import Configuration
    from .planner.tell import tell

    stripe, overlap, all_reduce = (
        layout.pop(name, None) for name in ("stripe", "overlap", "all_reduce")
    )
    pinned = from_json(Layout, {"tp": 1, "spp": 1, "kvp": 1} | layout, "--layout")
    precision = Precision(quantization or "auto", kv_cache_dtype)
    asked = Configuration(
        pinned,
        prompt,
        cached or 0,
        output,
        concurrency,
        chunk,
        cp,
        precision=precision,
        stripe=stripe,
        overlap=overlap,
        all_reduce=None if all_reduce is None else str(all_reduce),
        eager=enforce_eager,
    )
    with console.progress_bar() as progress:
        measure_if_local(cluster, calibrate and not precision.fp8, progress)
        progress("predicting")
        spec, machine, said = pipeline.predict(model, cluster, asked)
    if as_json:
        body = {"model": spec.name, "cluster": machine.name, "gpus": asked.ranks}
        click.echo(
            json.dumps(
                body | {"configuration": to_json(asked)} | to_json(said) | {"fits": said.fits}
            )
        )
    else:
        click.echo("\n".join(tell(spec.name, machine.name, asked, said)))


@cli.command()
@click.option("-o", "--out", type=folder, metavar="FILE", help="The cluster file to write.")
@click.option(
    "--quick", is_flag=True, help="Fewer sizes, in a third of the time; no search for tiles."
)
@click.option(
    "--gpu/--cpu", default=None, help="What to measure: by default the first GPU, if there is one."
)
@json_flag
def calibrate(out: Path | None, quick: bool, gpu: bool | None, as_json: bool) -> None:
    """Measure this machine with the kernels that plans use, and write a cluster file.

    Without -o, the file that `--cluster local` reads. Of a GPU, a cluster of nodes of such GPUs: links
    and the engine's overhead, which one GPU cannot tell, stay as in the shipped file. There our kernels'
    tiles are searched too, on from those that the file has, and installed flash-attn is measured beside them.

    \b
    Example:
      mnemoc calibrate -o this-machine.toml
    """
    import torch

    from . import calibration, calibration_gpu

    gpu = torch.cuda.is_available() if gpu is None else gpu
    measure = calibration_gpu.calibrate_gpu if gpu else calibration.calibrate
    with console.progress_bar() as progress:
        path, cluster = measure(out, progress, quick=quick)
    warn_if_disturbed(cluster)
    if as_json:
        click.echo(json.dumps({"file": str(path), **cluster.describe()}))
    else:
        click.echo(f"{path}: measured; plan with --cluster {path if out else 'local'}")


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


for command in (show, export, run, verify, serve, dashboard, replay, simulate):
    cli.add_command(command)
