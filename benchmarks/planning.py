"""How long a plan takes as a whole process, cold, and how much memory: mnemoc and aiconfigurator.

    python -m benchmarks.planning --aiconfigurator /path/to/venv/bin/aiconfigurator

Each question is put to both in turn, each time as a new process: wall time, processor time, peak memory of
the process, and the answer in a few words. aiconfigurator is not a dependency: without its path (version
0.12, in an environment of its own) its column is missing, and the report says so. It plans tensor and
pipeline degrees and batches, not chunks, KV groups or bounds: its time is for its part of the question.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mnemoc.artifact import Workload
from mnemoc.ir.model import load_model, read_config
from mnemoc.planner import WhatIf, frontier, load_cluster

from .harness import Figure, say, write_report

LIMIT_S = 300


@dataclass(frozen=True)
class Asked:
    """A question to both. aim_s: mnemoc's whole process; times in seconds."""

    name: str
    model: str
    nodes: int
    context: int
    ttft_s: float
    tbt_s: float
    aim_s: float

    @property
    def sentence(self) -> str:
        size = f"{self.context // 10**6}M tokens, {8 * self.nodes} H100"
        return f"{self.model}, {size}, {self.ttft_s:g} s / {self.tbt_s * 1e3:g} ms"


QUESTIONS = (
    Asked("70b", "llama-3-70b", 16, 1_000_000, 35, 0.03, 3.0),
    Asked("8b", "llama-3-8b", 8, 1_000_000, 30, 0.03, 3.0),
    Asked("70b-tight", "llama-3-70b", 8, 1_000_000, 30, 0.03, 3.0),
    Asked("8b-10m", "llama-3-8b", 16, 10_000_000, 600, 0.03, 3.0),
)


@dataclass(frozen=True)
class Run:
    """One process from start to end. peak_mib: its largest resident set."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    code: int
    answer: str


# A process that is started from a large one begins its life with that one's peak memory. So a small
# one stands between, and says: wall seconds, processor seconds, peak KiB, status.
_LAUNCHER = """
import json, os, signal, sys, time
limit, report, *words = sys.argv[1:]
started = time.perf_counter()
pid = os.posix_spawnp(words[0], words, os.environ)
signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
signal.alarm(int(limit))
_, status, used = os.wait4(pid, 0)
figures = time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss, status
open(report, "w").write(json.dumps(figures))
"""


def measure(words: Sequence[str], answer: Callable[[int, str], str]) -> Run:
    """Run a command to its end, in an empty folder; `answer` reads its exit code and output."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        work = Path(folder) / "work"
        work.mkdir()
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(LIMIT_S), str(report), *words]
        ran = subprocess.run(
            launch,
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        wall_s, cpu_s, peak_kib, status = json.loads(report.read_text())
    code = os.waitstatus_to_exitcode(status)
    return Run(wall_s, cpu_s, peak_kib / 1024, code, answer(code, ran.stdout))


# ------------------------------------------------------------------------------------- contenders


def ours(asked: Asked, *more: str) -> Run:
    words = [sys.executable, "-m", "mnemoc", "plan", asked.model, "--cluster", "dgx-h100"]
    words += ["--nodes", str(asked.nodes), "--context", str(asked.context)]
    words += ["--ttft", f"{asked.ttft_s}s", "--tbt", f"{asked.tbt_s}s", "--json", *more]
    return measure(words, _our_answer)


def _our_answer(code: int, text: str) -> str:
    if code == 3:
        return next(line for line in text.splitlines() if line.startswith("mnemoc: "))[8:]
    plan = json.loads(text)
    said, memory = plan["predicted"], plan["memory"]
    layout = " ".join(f"{axis}={degree}" for axis, degree in plan["layout"].items())
    used = {part.removesuffix("_bytes") for part in memory} - {"capacity", "step"}
    held = sum(memory[f"{part}_bytes"] for part in used)
    return (
        f"{plan['gpus']} GPUs, {layout}, TTFT {said['ttft_s']:.1f} s, TBT {said['tbt_s'] * 1e3:.1f} ms, "
        f"{held / 2**30:.1f} GiB per rank, proven gap {plan['optimality']['gap']:.2%}"
    )


def theirs(asked: Asked, program: Path, models: Path) -> Run:
    """The nearest question that it takes: agg serving, TTFT and time per output token as a strict promise."""
    words = [str(program), "cli", "default", "--model-path", str(models / asked.model)]
    words += ["--system", "h100_sxm", "--total-gpus", str(8 * asked.nodes), "--no-color"]
    words += ["--isl", str(asked.context), "--osl", "256", "--serving-mode", "agg"]
    words += ["--ttft", f"{asked.ttft_s * 1e3:g}", "--tpot", f"{asked.tbt_s * 1e3:g}"]
    return measure([*words, "--strict-sla"], _their_answer)


def _their_answer(code: int, text: str) -> str:
    refused = re.search(r"found no SLA-feasible configuration", text)
    best = re.search(r"TTFT: ([\d.]+) ?ms.*?TPOT: ([\d.]+) ?ms", text, re.DOTALL)
    if refused:
        return "no configuration meets it"
    if best:
        return f"TTFT {float(best[1]) / 1e3:.1f} s, TPOT {best[2]} ms"
    return f"exit {code}: {text.strip().splitlines()[-1][:120] if text.strip() else 'no output'}"


def write_models(folder: Path) -> None:
    """A folder per model with its config.json, which is what aiconfigurator reads offline."""
    for name in {asked.model for asked in QUESTIONS}:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(read_config(name)))


# ---------------------------------------------------------------------------------- in the process


def solve_again_s(asked: Asked) -> list[float]:
    """Seconds of what-ifs on a question that was solved once."""
    workload = Workload(asked.context, asked.ttft_s, asked.tbt_s)
    question = WhatIf(
        load_model(asked.model), load_cluster("dgx-h100"), workload, nodes=asked.nodes
    )
    question.solve()
    seconds = []
    for ttft, tbt, more in ((1.1, 1, 0), (0.9, 1, 0), (2, 1.5, 0), (1, 0.8, 0), (1, 1, 8)):
        started = time.perf_counter()
        question.solve(
            ttft_s=asked.ttft_s * ttft, tbt_s=asked.tbt_s * tbt, gpus=8 * asked.nodes + more
        )
        seconds.append(time.perf_counter() - started)
    return seconds


def frontier_s(asked: Asked) -> tuple[float, int]:
    """Seconds of a frontier from scratch, and its points."""
    workload = Workload(asked.context, asked.ttft_s, asked.tbt_s)
    started = time.perf_counter()
    question = WhatIf(
        load_model(asked.model), load_cluster("dgx-h100"), workload, nodes=asked.nodes
    )
    points = frontier(question).points
    return time.perf_counter() - started, len(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aiconfigurator", type=Path, help="its executable, version 0.12")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    program = options.aiconfigurator
    if program is None or not program.exists():
        say("no aiconfigurator: pip install aiconfigurator==0.12.* in an environment of its own,")
        say("and give --aiconfigurator PATH/bin/aiconfigurator; measuring mnemoc alone")
        program = None
    figures: list[Figure] = []
    runs: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_models(models)
        for asked in QUESTIONS:
            say(asked.sentence)
            mine: list[Run] = []
            other: list[Run] = []
            for _ in range(options.repeats):
                mine.append(ours(asked))
                say(f"  mnemoc: {mine[-1].wall_s:.2f} s, {mine[-1].peak_mib:.0f} MiB")
                if program is not None:
                    other.append(theirs(asked, program, models))
                    say(f"  aiconfigurator: {other[-1].wall_s:.2f} s, {other[-1].peak_mib:.0f} MiB")
            runs[asked.name] = {
                "question": asdict(asked),
                "mnemoc": [asdict(run) for run in mine],
                "aiconfigurator": [asdict(run) for run in other],
            }
            figures += _figures(asked, mine, other)
    first = QUESTIONS[0]
    edge = [ours(first, "--pareto") for _ in range(options.repeats)]
    again = solve_again_s(first)
    inside_s, points = frontier_s(first)
    runs["pareto"], runs["solve_again_s"] = [asdict(run) for run in edge], again
    figures += [
        Figure(
            f"{first.sentence}: with --pareto",
            _median(edge),
            "s",
            "≤ 3 s",
            f"{points} points, of which {inside_s:.2f} s for question and frontier themselves",
        ),
        Figure("solved again", max(again) * 1e3, "ms", "≤ 200 ms", f"slowest of {len(again)}"),
    ]
    if program is None:
        figures.append(
            Figure("aiconfigurator", 0, "runs", "side by side", "not given: not measured")
        )
    write_report("planning", "Planning: whole processes, cold, side by side", figures, runs)


def _figures(asked: Asked, mine: Sequence[Run], other: Sequence[Run]) -> list[Figure]:
    figures = [
        Figure(f"{asked.sentence}: mnemoc", _median(mine), "s", f"≤ {asked.aim_s:g} s",
               f"{_peak(mine):.0f} MiB; {mine[0].answer}")
    ]  # fmt: skip
    if other:
        ratio = _median(other) / _median(mine)
        figures += [
            Figure(f"{asked.sentence}: aiconfigurator", _median(other), "s", "–",
                   f"{_peak(other):.0f} MiB; {other[0].answer}"),
            Figure(f"{asked.sentence}: times faster", ratio, "×", "≥ 5 ×",
                   f"memory {_peak(other) / _peak(mine):.1f} × less"),
        ]  # fmt: skip
    return figures


def _median(runs: Sequence[Run]) -> float:
    return statistics.median(run.wall_s for run in runs)


def _peak(runs: Sequence[Run]) -> float:
    return max(run.peak_mib for run in runs)


if __name__ == "__main__":
    main()
