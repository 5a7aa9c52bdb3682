"""Short requests behind a long prompt, on this machine: how long they wait, and what it costs the others.

A long prompt is prefilled beside requests that decode, and short ones come by a Poisson process until it has
its first token. Policies, and other engines' ways to fill a micro-batch, take turns within each repeat, with
the same arrivals; "idle" is the same without the long prompt. One worker, one thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mnemoc.folder import load_artifact
from mnemoc.runtime import Engine, Handle, Request, Sampling
from mnemoc.runtime.scheduling.scheduler import MIN_DEADLINE_S
from mnemoc.runtime.simulation.baselines import FixedChunk, WholePrefill

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

TBT_S = 0.1
LONG_TOKENS = 8192
RUNNING = 2  # requests that decode all the while
SHORT_TOKENS = (24, 96)
SHORT_OUT = 8
RATE = 2.0  # short requests in a second
GREEDY = Sampling(ignore_eos=True)


@dataclass(frozen=True)
class Contender:
    """How an engine schedules. long: whether there is a long prompt; short: whether anybody else is there."""

    policy: str = "lars-slack"
    packing: Callable[..., Any] | None = None
    long: bool = True
    short: bool = True


@dataclass(frozen=True)
class Run:
    """Seconds: TTFT of each short request and of the long one; of the running requests the gaps between
    tokens, and how far each token was behind first + i·promise (0: it was not)."""

    short_s: list[float] = field(default_factory=list)
    long_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)


def run(plan: Path, model: Path, contender: Contender, seed: int, idle_s: float) -> Run:
    """idle_s: how long short requests come where there is no long prompt."""
    choose = random.Random(seed)
    with Engine.start(
        plan,
        model,
        policy=contender.policy,
        packing=contender.packing,
        prefix_caching=False,
    ) as engine:
        count = RUNNING * contender.short
        running = [engine.submit(Request(prompt(40 + i), 4000, GREEDY)) for i in range(count)]
        for handle in running:
            next(iter(handle))
        time.sleep(0.2)
        began_s = time.monotonic()
        long: Handle | None = None
        if contender.long:
            long = engine.submit(Request(prompt(LONG_TOKENS), 1, GREEDY))
        shorts: list[Handle] = []
        while True:
            wait_s = choose.expovariate(RATE)
            ids = prompt(choose.randrange(*SHORT_TOKENS))
            if not _wait(long, began_s + idle_s, time.monotonic() + wait_s):
                break
            if contender.short:
                shorts.append(engine.submit(Request(ids, SHORT_OUT, GREEDY)))
        ended_s = time.monotonic()
        for handle in shorts:
            handle.result()
        for handle in running:
            handle.cancel()
    gaps_s, late_s = [], []
    for handle in running:
        times = handle.token_times_s
        for i in range(1, len(times)):
            if began_s < times[i - 1] < ended_s:
                gaps_s.append(times[i] - times[i - 1])
                late_s.append(max(0.0, times[i] - times[0] - i * TBT_S))
    short_s = [handle.ttft_s for handle in shorts if handle.ttft_s is not None]
    return Run(short_s, long.ttft_s or 0.0 if long else 0.0, gaps_s, late_s)


def _wait(long: Handle | None, idle_until_s: float, until_s: float) -> bool:
    """Sleep until then; False as soon as the long request is through, or its time is up if there is none."""
    while (now_s := time.monotonic()) < until_s:
        if long.finish_reason is not None if long else now_s > idle_until_s:
            return False
        time.sleep(min(0.005, until_s - now_s))
    return True


def figures(name: str, runs: Sequence[Run], alone_s: float, idle: Sequence[Run]) -> list[Figure]:
    """Of one contender: percentiles over all repeats, the long one's median."""
    short_s = [t for run in runs for t in run.short_s]
    gaps_s = [t for run in runs for t in run.gaps_s]
    late_s = [t for run in runs for t in run.late_s]
    idle_s = [t for run in idle for t in run.short_s]
    ours = name.startswith("lars")
    found = []
    for percent in (50, 99):
        value, base = percentile(short_s, percent), percentile(idle_s, percent)
        found.append(
            Figure(
                f"{name}: p{percent} TTFT of short requests",
                value * 1e3,
                "ms",
                f"≤ {MIN_DEADLINE_S * 1e3:.3g}, the deadline" if ours else "-",
                f"{len(short_s)} requests; {value / base:.3g} × idle",
            )
        )
    detail = f"p50 {percentile(gaps_s, 50) * 1e3:.3g} ms, most {max(gaps_s) * 1e3:.4g} ms, of {len(gaps_s)}"
    found.append(
        Figure(
            f"{name}: p99 gap between tokens of running decodes",
            percentile(gaps_s, 99) * 1e3,
            "ms",
            f"≤ {TBT_S * 1e3:.3g}" if ours else "-",
            detail,
        )
    )
    detail = f"p50 {percentile(late_s, 50) * 1e3:.3g} ms, most {max(late_s) * 1e3:.4g} ms"
    found.append(
        Figure(
            f"{name}: p99 lateness behind first + i · promise",
            percentile(late_s, 99) * 1e3,
            "ms",
            "0" if ours else "-",
            detail,
        )
    )
    if runs[0].long_s:
        times = [run.long_s for run in runs]
        told = ", ".join(f"{t:.3g}" for t in times)
        slower = statistics.median(times) / alone_s
        detail = f"{told} s over {alone_s:.3g} s"
        found.append(Figure(f"{name}: long prompt, over alone", slower, "×", "-", detail))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="mnemoc-convoy.") as folder:
        work = Path(folder)
        say("measuring this machine")
        mnemoc("calibrate", "--cpu", "-o", work / "local.toml")
        model, plan = make_model(work / "model", **SMALL_MODEL), work / "plan"
        layout, tbt = "tp=1,spp=1,kvp=1", f"{TBT_S * 1e3:.4g}ms"
        made = make_plan(plan, model, work / "local.toml", layout, LONG_TOKENS, 64, tbt=tbt)
        budget = load_artifact(plan)[0].plan.chunk_at(0)
        contenders = {
            "alone": Contender(short=False),
            "idle": Contender(long=False),
            "lars-slack": Contender(),
            "lars": Contender("lars"),
            "fcfs": Contender("fcfs"),
            "fixed-chunk": Contender("fcfs", partial(FixedChunk, budget=budget)),
            "whole-prefill": Contender("fcfs", WholePrefill),
        }
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        for repeat in range(chosen.repeats):
            idle_s = 1.0
            for name, contender in contenders.items():
                got = run(plan, model, contender, repeat, idle_s)
                idle_s = got.long_s or idle_s
                runs[name].append(got)
                short_s = got.short_s or [0.0]
                say(
                    f"  {name}: long {got.long_s:.3g} s, {len(got.short_s)} short, "
                    f"p50 {percentile(short_s, 50):.3g} s, most {max(short_s):.3g} s"
                )
    alone_s = statistics.median(got.long_s for got in runs.pop("alone"))
    found = [
        figure for name, got in runs.items() for figure in figures(name, got, alone_s, runs["idle"])
    ]
    details: dict[str, Any] = {
        name: [{"short_s": one.short_s, "long_s": one.long_s} for one in got]
        for name, got in runs.items()
    }
    details |= {"chunks": made["chunks"], "fixed chunk": budget, "alone_s": alone_s}
    write_report("convoy", "Short requests behind a long prompt", found, details)


if __name__ == "__main__":
    main()
