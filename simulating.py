"""`mnemoc simulate`: traffic through a plan on a virtual clock, and what came of it as text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from . import console
from .errors import BadInput, UsageError
from .options import duration, folder, json_flag, policy_option
from .units import format_count, format_duration

if TYPE_CHECKING:
    from .runtime.simulation import Capacity, ClassResult, Result, Spread, Survey, Traffic


@click.command()
@click.argument("directory", type=folder)
@click.option("--trace", type=folder, metavar="FILE", help="Ours, Azure's or Mooncake's.")
@click.option("--workload", metavar="NAME|FILE", help="sharegpt, paper-mix or a TOML file.")
@click.option("--qps", type=float, metavar="RATE", help="Requests per second, whatever it says.")
@click.option("--duration", callback=duration, metavar="TIME", help="Such as 10min.")
@policy_option
@click.option(
    "--engine",
    default="mnemoc",
    show_default=True,
    metavar="NAME",
    help="Or a baseline: whole-prefill, fixed-chunk.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the workload."
)
@click.option("--skip-unservable", is_flag=True, help="Leave out requests that can never fit.")
@click.option(
    "--capacity", is_flag=True, help="Search the highest rate at which 99 % keep promises."
)
@click.option("--perfetto", type=folder, metavar="FILE", help="Write a trace: .json or .json.gz.")
@json_flag
def simulate(
    directory: Path,
    trace: Path | None,
    workload: str | None,
    qps: float | None,
    duration: float | None,
    policy: str,
    engine: str,
    seed: int,
    skip_unservable: bool,
    capacity: bool,
    perfetto: Path | None,
    as_json: bool,
) -> None:
    """Run traffic through a plan without its machines: the engine's own scheduler on a virtual clock.

    Every iteration takes the time that the plan's cost function says. The same seed gives the same result.

    \b
    Example:
      mnemoc simulate plan/ --workload paper-mix --qps 0.5 --perfetto trace.json.gz
    """
    from .codec import to_json
    from .folder import load_artifact
    from .runtime.loader import ArtifactModules
    from .runtime.simulation import (
        OURS,
        Asked,
        Limits,
        Question,
        Simulation,
        find_capacity,
        survey,
    )
    from .runtime.telemetry.tracing import Recorder

    if capacity and perfetto is not None:
        raise UsageError("--perfetto shows one simulation, --capacity makes many")
    if trace is not None and perfetto is not None and trace.absolute() == perfetto.absolute():
        raise UsageError("--perfetto would be written over the --trace")
    asked = Asked(policy, engine, seed)
    chosen = click.get_current_context().get_parameter_source("policy")
    if engine != OURS and chosen is ParameterSource.COMMANDLINE and policy != "fcfs":
        raise UsageError(
            "the baselines are first come, first served", where="--policy", do="leave it out"
        )
    manifest, contents = load_artifact(directory)
    cost = ArtifactModules(directory, contents, ["cost.py"]).load("cost")
    found: Result | Capacity | None
    with ExitStack() as stack:
        progress = stack.enter_context(console.progress_bar())
        progress("reading the traffic")
        traffic = _traffic(trace, workload, qps, duration, seed)
        surveyed = survey(traffic, Limits.of(manifest), skip=skip_unservable)
        if capacity:
            question = Question(manifest, cost, traffic, asked, skip_unservable)
            found = find_capacity(question, _rate(surveyed), progress)
        else:
            recorder = None
            if perfetto is not None:
                recorder = stack.enter_context(Recorder.open(perfetto, manifest.plan.layout))
            found = Simulation(manifest, cost, traffic, surveyed, asked, recorder).run(progress)
    if as_json:
        click.echo(json.dumps(to_json(found)))
    else:
        click.echo("\n".join(tell(found)))


def _traffic(
    trace: Path | None, workload: str | None, qps: float | None, until_s: float | None, seed: int
) -> Traffic:
    from .runtime.simulation import LEAST_QPS, MOST_QPS, Trace, load_workload

    if (trace is None) == (workload is None):
        raise UsageError("give one of --trace and --workload")
    if qps is not None and not LEAST_QPS <= qps <= MOST_QPS:  # NaN neither
        what = f"the rate must lie between {LEAST_QPS:g} and {MOST_QPS:g} requests per second"
        raise BadInput(what, where="--qps", got=qps)
    traffic: Traffic
    if trace is not None:
        traffic = Trace(trace)
        traffic = traffic if qps is None else traffic.at(qps)
        return traffic if until_s is None else dataclasses.replace(traffic, duration_s=until_s)
    assert workload is not None
    invented = dataclasses.replace(load_workload(workload), seed=seed)
    invented = invented if qps is None else invented.at(qps)
    return invented if until_s is None else dataclasses.replace(invented, duration_s=until_s)


def _rate(surveyed: Survey) -> float:
    if not surveyed.last_s:
        raise BadInput("all requests come at once: there is no rate to search", where="--capacity")
    return (surveyed.requests + surveyed.skipped) / surveyed.last_s


def tell(found: Result | Capacity | None) -> Iterator[str]:
    """A simulation or a search, line by line."""
    from .runtime.simulation import Capacity

    if isinstance(found, Capacity):
        for trial in found.trials:
            kept = "too many are broken" if trial.kept is None else f"{trial.kept:.2%} kept"
            yield f"  {trial.qps:>8.3g} requests/s  {kept}"
        if found.result is None:
            yield f"capacity: none; even so few do not keep {found.share:.0%} of their promises"
            return
        yield f"capacity: {found.qps:.3g} requests/s keep {found.share:.0%} of their promises"
        yield ""
        found = found.result
    assert found is not None, "a simulation without a limit runs to its end"
    yield from _tell_result(found)


def _tell_result(found: Result) -> Iterator[str]:
    how = found.policy if found.engine == "mnemoc" else f"{found.engine}, {found.policy}"
    skipped = f", {found.skipped:,} that can never fit left out" if found.skipped else ""
    yield (
        f"{found.traffic} on {found.layout.gpus} ranks ({found.layout}), {how}, seed {found.seed}"
    )
    yield (
        f"{found.requests:,} requests in {format_duration(found.seconds)}, "
        f"{found.micro_batches:,} micro-batches{skipped}"
    )
    yield ""
    yield from _table(found)
    yield ""
    yield (
        f"throughput: {found.requests_per_s:.3g} requests/s, {format_count(found.prompt_tokens_per_s)} "
        f"prompt tokens/s, {format_count(found.output_tokens_per_s)} output tokens/s"
    )
    yield (
        f"goodput:    {found.goodput_requests_per_s:.3g} requests/s, "
        f"{format_count(found.goodput_tokens_per_s)} output tokens/s kept all promises"
    )
    yield (
        f"fairness:   Jain's index {found.fairness:.3f} over the length classes' slowdown; the most "
        f"slowed request took {found.most_slowed:.3g}× its idle TTFT"
    )
    yield from _tell_machine(found)


def _tell_machine(found: Result) -> Iterator[str]:
    pages = found.pages
    yield (
        f"pages:      {pages.preemptions:,} preemptions ({format_count(pages.recomputed)} tokens computed "
        f"again, {format_count(pages.recovered)} found again), {format_count(pages.hit_tokens)} prompt "
        f"tokens in pages at once, {pages.swapped_out:,} pages swapped out, {pages.swapped_in:,} in"
    )
    shares = [f"MFU {found.mfu:.1%}"] if found.mfu is not None else []
    shares += [f"MBU {found.mbu:.1%}"] if found.mbu is not None else []
    stages = ", ".join(
        f"{i}: {stage.mean:.0%}" + (f" (link {stage.link:.0%})" if stage.link is not None else "")
        for i, stage in enumerate(found.stages)
    )
    yield f"machine:    {', '.join([*shares, f'stages busy {stages}'])}"


_COLUMNS = (
    "TTFT p50",
    "p90",
    "p99",
    "p99.9",
    "TBT p50",
    "p99",
    "late p99",
    "e2e p50",
    "queued p99",
)


def _table(found: Result) -> Iterator[str]:
    """A line for each class."""
    heads = "".join(f"{head:>11}" for head in _COLUMNS)
    yield f"  {'prompt':<12}{'requests':>9}{'kept':>8}{heads}{'slowed':>9}"
    kinds = [] if len(found.kinds) == 1 else [("", None), *((k.name, k) for k in found.kinds)]
    rows = [*((one.name, one) for one in found.lengths), ("all", found.everything), *kinds]
    for name, one in rows:
        yield "" if one is None else _row(name or "unnamed", one)


def _row(name: str, one: ClassResult) -> str:
    cells = [one.ttft.p50, one.ttft.p90, one.ttft.p99, one.ttft.p999]
    cells += [_of(one.tbt, "p50"), _of(one.tbt, "p99"), _of(one.lateness, "p99")]
    cells += [one.e2e.p50, one.queued.p99]
    times = "".join(f"{'–' if math.isnan(s) else format_duration(s):>11}" for s in cells)
    return f"  {name:<12}{one.requests:>9,}{one.kept:>8.1%}{times}{one.slowdown.mean:>8.2f}×"


def _of(spread: Spread | None, percentile: str) -> float:
    return math.nan if spread is None else float(getattr(spread, percentile))
