"""Simulated against running: one trace through `mnemoc simulate` and through workers on this machine.

Prompts of mixed lengths come by a Poisson process. The plan's figures of the machine are measured just before
each run, and percentiles of the time to first token and between tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemoc.runtime import Engine, Request, Sampling

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

CONTEXT, MOST_OUT = 4096, 64
RATES = {
    "tp=1,spp=1,kvp=1": 1.5,
    "tp=1,spp=2,kvp=1": 2.0,
}  # requests in a second, about half of what fits
PERCENTS = (50, 90, 99)
Percentiles = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Arrival:
    time_s: float
    prompt: int
    output: int


def make_trace(requests: int, rate: float) -> list[Arrival]:
    """Most prompts have some hundred tokens, some have thousands."""
    choose, time_s, trace = random.Random(5), 0.0, []
    for _ in range(requests):
        time_s += choose.expovariate(rate)
        length = min(CONTEXT, 16 + int(choose.lognormvariate(5.3, 1.1)))
        trace.append(Arrival(time_s, length, choose.randrange(2, MOST_OUT + 1)))
    return trace


def simulate(plan: Path, trace: Sequence[Arrival], file: Path) -> Percentiles:
    lines = [
        {"time_s": a.time_s, "prompt_tokens": a.prompt, "output_tokens": a.output} for a in trace
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads(mnemoc("simulate", plan, "--trace", file, "--json"))["everything"]
    return {what: {p: found[what][f"p{p}"] for p in PERCENTS} for what in ("ttft", "tbt")}


def run(plan: Path, model: Path, trace: Sequence[Arrival]) -> Percentiles:
    """The same requests, when they come, through the engine."""
    requests = [
        Request(prompt(a.prompt), a.output, Sampling(ignore_eos=True), "none") for a in trace
    ]
    with Engine.start(plan, model, prefix_caching=False) as engine:
        began_s, handles = time.monotonic(), []
        for arrival, request in zip(trace, requests, strict=True):
            time.sleep(max(0.0, began_s + arrival.time_s - time.monotonic()))
            handles.append(engine.submit(request))
        for handle in handles:
            handle.result()
    times = {
        "ttft": [handle.ttft_s for handle in handles if handle.ttft_s is not None],
        "tbt": [gap for handle in handles for gap in handle.tbt_s],
    }
    return {what: {p: percentile(found, p) for p in PERCENTS} for what, found in times.items()}


def figures(layout: str, rounds: Sequence[dict[str, Percentiles]]) -> list[Figure]:
    """Simulated over running, each the median over the rounds."""
    found = []
    for what in ("ttft", "tbt"):
        for p in PERCENTS:
            pairs = [(one["simulated"][what][p], one["running"][what][p]) for one in rounds]
            value = statistics.median(guess / got for guess, got in pairs)
            told = ", ".join(f"{guess * 1e3:.4g} over {got * 1e3:.4g}" for guess, got in pairs)
            name = f"p{p} {what.upper()}, {layout}"
            found.append(Figure(name, value, "×", "0.8 to 1.2", f"{told} ms"))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=80)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tbt", default="80ms", help="the plan's promise")
    chosen = options.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {layout: [] for layout in RATES}
    with tempfile.TemporaryDirectory(prefix="mnemoc-simulated.") as folder:
        work = Path(folder)
        model = make_model(work / "model", **SMALL_MODEL)
        for number in range(1, chosen.rounds + 1):
            say(f"round {number}: measuring this machine")
            cluster = work / f"local{number}.toml"
            mnemoc("calibrate", "--cpu", "-o", cluster)
            for layout, rate in RATES.items():
                plan, trace = work / f"{number} {layout}", make_trace(chosen.requests, rate)
                make_plan(plan, model, cluster, layout, CONTEXT, MOST_OUT, tbt=chosen.tbt)
                got = {
                    "simulated": simulate(plan, trace, work / "trace.jsonl"),
                    "running": run(plan, model, trace),
                }
                runs[layout].append(got)
                say(f"  {layout}: {got}")
    found = [figure for layout, rounds in runs.items() for figure in figures(layout, rounds)]
    errors = [100 * abs(figure.value - 1) for figure in found]
    worst = Figure("worst error", max(errors), "%", "≤ 20", f"of {len(errors)} percentiles")
    write_report("simulated", "Simulated against running", [worst, *found], runs)


if __name__ == "__main__":
    main()
