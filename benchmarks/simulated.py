"""Simulated against running: one trace on a virtual clock, as `mnemoc simulate` has it, and through workers
on this machine.

Prompts of mixed lengths come by a Poisson process, in each round others. The machine is measured just before
each run, for it is quicker at some times than at others, by as much as a third within minutes; so the rounds'
times are put together, simulated ones and measured ones, and percentiles of all are compared. Answers are
short, so that a quarter of the times between tokens is that of a chunk, ten times as long as the others: no
percentile that is looked at lies where the one kind ends and the other begins.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemoc.folder import load_artifact
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.loader import ArtifactModules
from mnemoc.runtime.request import Handle
from mnemoc.runtime.simulation import Asked, Limits, Simulation, Trace, survey

from .harness import (
    SMALL_MODEL,
    Figure,
    make_model,
    make_plan,
    mnemoc,
    percentile,
    prompt,
    say,
    write_report,
)

CONTEXT, MOST_OUT = 4096, 6
RATES = {
    "tp=1,spp=1,kvp=1": 1.5,
    "tp=1,spp=2,kvp=1": 3.0,
}  # requests in a second, about half of what fits
PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class Arrival:
    time_s: float
    prompt: int
    output: int


@dataclass
class Times:
    """Seconds, of all requests: to the first token, and between tokens."""

    ttft: list[float] = field(default_factory=list)
    tbt: list[float] = field(default_factory=list)

    def add(self, handles: Iterable[Handle]) -> None:
        for handle in handles:
            assert handle.ttft_s is not None, "it has ended well"
            self.ttft.append(handle.ttft_s)
            self.tbt += handle.tbt_s


def make_trace(requests: int, rate: float, seed: int) -> list[Arrival]:
    """Most prompts have some hundred tokens, some have thousands."""
    choose, time_s, trace = random.Random(seed), 0.0, []
    for _ in range(requests):
        time_s += choose.expovariate(rate)
        length = min(CONTEXT, 16 + int(choose.lognormvariate(5.3, 1.1)))
        trace.append(Arrival(time_s, length, choose.randrange(2, MOST_OUT + 1)))
    return trace


def simulate(plan: Path, trace: Sequence[Arrival], file: Path) -> list[Handle]:
    lines = [
        {"time_s": a.time_s, "prompt_tokens": a.prompt, "output_tokens": a.output} for a in trace
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest, contents = load_artifact(plan)
    cost = ArtifactModules(plan, contents, ["cost.py"]).load("cost")
    ended: list[Handle] = []
    surveyed = survey(Trace(file), Limits.of(manifest), skip=False)
    Simulation(manifest, cost, Trace(file), surveyed, Asked(), on_end=ended.append).run()
    assert len(ended) == len(trace)
    return ended


def run(plan: Path, model: Path, trace: Sequence[Arrival]) -> list[Handle]:
    """The same requests, when they come, through the engine."""
    requests = [
        Request(prompt(a.prompt), a.output, Sampling(ignore_eos=True), "none") for a in trace
    ]
    with Engine.start(plan, model, prefix_caching=False) as engine:
        began_s, handles = time.monotonic(), []
        for arrival, request in zip(trace, requests, strict=True):
            time.sleep(max(0.0, began_s + arrival.time_s - time.monotonic()))
            handles.append(engine.submit(request))
        return [handle.result() for handle in handles]


def figures(layout: str, simulated: Times, running: Times) -> list[Figure]:
    """Simulated over running."""
    found = []
    for what in ("ttft", "tbt"):
        for p in PERCENTS:
            guess, got = (percentile(getattr(times, what), p) for times in (simulated, running))
            detail = (
                f"{guess * 1e3:.4g} over {got * 1e3:.4g} ms, of {len(getattr(running, what)):,}"
            )
            name = f"p{p} {what.upper()}, {layout}"
            found.append(Figure(name, guess / got, "×", "0.8 to 1.2", detail))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=80)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tbt", default="80ms", help="the plan's promise")
    chosen = options.parse_args()
    kinds = ("simulated", "running")
    times = {layout: {kind: Times() for kind in kinds} for layout in RATES}
    rounds: dict[str, list[Any]] = {layout: [] for layout in RATES}
    with tempfile.TemporaryDirectory(prefix="mnemoc-simulated.") as folder:
        work = Path(folder)
        model = make_model(work / "model", **SMALL_MODEL)
        for number in range(1, chosen.rounds + 1):
            for layout, rate in RATES.items():
                say(f"round {number}: {layout}")
                cluster, plan = work / "local.toml", work / f"{number} {layout}"
                mnemoc("calibrate", "--cpu", "-o", cluster)
                make_plan(plan, model, cluster, layout, CONTEXT, MOST_OUT, tbt=chosen.tbt)
                trace = make_trace(chosen.requests, rate, seed=number)
                one = {kind: Times() for kind in kinds}
                one["simulated"].add(simulate(plan, trace, work / "trace.jsonl"))
                one["running"].add(run(plan, model, trace))
                for kind in kinds:
                    times[layout][kind].ttft += one[kind].ttft
                    times[layout][kind].tbt += one[kind].tbt
                told = figures(layout, *one.values())
                rounds[layout].append({figure.name: figure.value for figure in told})
                say(
                    "".join(
                        f"  {figure.name}: {figure.value:.3f} × ({figure.detail})\n"
                        for figure in told
                    )
                )
    found = [figure for layout, both in times.items() for figure in figures(layout, *both.values())]
    errors = [100 * abs(figure.value - 1) for figure in found]
    worst = Figure("worst error", max(errors), "%", "≤ 20", f"of {len(errors)} percentiles")
    write_report("simulated", "Simulated against running", [worst, *found], rounds)


if __name__ == "__main__":
    main()
