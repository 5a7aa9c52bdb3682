"""Predicted against measured time to first token: what `X-Predicted-TTFT-Seconds` is worth.

    python -m benchmarks.forecast           also benchmarks/results/forecast.{json,md}

Running: prompts of mixed lengths come by a Poisson process to a small model on this machine, whose figures
are measured just before; each is told when it comes when its first token will. Simulated: the paper's mix on
16 A100, where cost.py is always right, so what is left is what the forecast does not know: who comes later,
and what a fluid leaves out. What a forecast costs the engine is measured there too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest import mock

from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.request import Handle
from mnemoc.runtime.scheduling.forecast import Forecast
from mnemoc.runtime.simulation import Asked, Limits, Simulation, survey

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
from .simulated import CONTEXT, MOST_OUT, RATES, make_trace
from .traffic_runs import SMALL, mix

LONG = 16_000
"""Tokens from which on a prompt of the paper's mix is a long one."""
SIMULATED_S = 1800.0
SIMULATED_QPS = (0.5, 1.0)
Pair = tuple[int, float, float]
"""Prompt tokens; seconds to the first token, as predicted and as measured."""


def pairs(handles: Iterable[Handle]) -> list[Pair]:
    return [
        (len(handle.request.prompt_ids), handle.predicted_ttft_s, handle.ttft_s)
        for handle in handles
        if handle.predicted_ttft_s is not None and handle.ttft_s is not None
    ]


def running(plan: Path, model: Path, requests: int, rate: float, seed: int) -> list[Pair]:
    """A trace through workers on this machine, once the first of it has taught the forecast."""
    sampling, handles = Sampling(ignore_eos=True), []
    with Engine.start(plan, model, prefix_caching=False) as engine:
        began_s = time.monotonic()
        for arrival in make_trace(requests, rate, seed):
            time.sleep(max(0.0, began_s + arrival.time_s - time.monotonic()))
            request = Request(prompt(arrival.prompt), arrival.output, sampling)
            handles.append(engine.submit(request))
        for handle in handles:
            handle.result()
    return pairs(handles)


def simulated(qps: float) -> tuple[list[Pair], list[float]]:
    """The paper's mix, and the seconds that each forecast took."""
    manifest, cost = SMALL.made()
    traffic, handles, took_s = mix(qps, 0.05, SIMULATED_S), [], []
    surveyed = survey(traffic, Limits.of(manifest), skip=True)
    look = Forecast.look

    def timed(*arguments: object) -> object:
        began_s = time.perf_counter()
        found = look(*arguments)  # type: ignore[arg-type]
        took_s.append(time.perf_counter() - began_s)
        return found

    with mock.patch.object(Forecast, "look", timed):
        Simulation(manifest, cost, traffic, surveyed, Asked(), on_end=handles.append).run()
    return pairs(handles), took_s


def figures(name: str, found: Sequence[Pair], aim: str) -> list[Figure]:
    """Predicted over measured, and how far that is from one."""
    ratios = [predicted_s / measured_s for _, predicted_s, measured_s in found]
    errors = [100 * abs(ratio - 1) for ratio in ratios]
    ttft_s = [measured_s for *_, measured_s in found]
    spread = ", ".join(f"p{p} {percentile(ratios, p):.2f}" for p in (10, 50, 90))
    detail = f"{len(found)} requests; predicted over measured {spread}"
    lasted = f"measured TTFT p50 {percentile(ttft_s, 50):.3g} s, p90 {percentile(ttft_s, 90):.3g} s"
    return [
        Figure(f"{name}: median error", statistics.median(errors), "%", aim, detail),
        Figure(f"{name}: p90 error", percentile(errors, 90), "%", "-", lasted),
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=80)
    options.add_argument("--rounds", type=int, default=2, help="0: only simulate")
    chosen = options.parse_args()
    runs: dict[str, list[Pair]] = {}
    found: list[Figure] = []
    for qps in SIMULATED_QPS:
        say(f"simulating the paper's mix at {qps:g} requests/s")
        got, took_s = simulated(qps)
        name = f"paper's mix, {qps:g} requests/s, simulated"
        runs[name] = got
        found += figures(f"{name}, conversations", [one for one in got if one[0] < LONG], "≤ 10")
        found += figures(f"{name}, long prompts", [one for one in got if one[0] >= LONG], "≤ 20")
        detail = f"p99 {percentile(took_s, 99) * 1e6:.0f} µs"
        found.append(
            Figure(f"{name}: a forecast", statistics.median(took_s) * 1e6, "µs", "≤ 1000", detail)
        )
    with tempfile.TemporaryDirectory(prefix="mnemoc-forecast.") as folder:
        work = Path(folder)
        model = make_model(work / "model", **SMALL_MODEL)
        for number in range(1, chosen.rounds + 1):
            for layout, rate in RATES.items():
                say(f"round {number}: {layout}")
                cluster, plan = work / "local.toml", work / f"{number} {layout}"
                mnemoc("calibrate", "--cpu", "-o", cluster)
                make_plan(plan, model, cluster, layout, CONTEXT, MOST_OUT, tbt="80ms")
                got = running(plan, model, chosen.requests, rate, seed=number)
                runs.setdefault(layout, []).extend(got)
                say(f"  {layout}: {figures(layout, got, '')[0]}")
    for layout in sorted(RATES.keys() & runs.keys()):
        found += figures(f"{layout}, running", runs[layout], "≤ 25")
    write_report("forecast", "Predicted against measured time to first token", found, runs)


if __name__ == "__main__":
    main()
