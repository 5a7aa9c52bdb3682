"""What the benchmarks share: models, plans and engines to measure; interleaved runs; the report.

Contenders take turns within each repeat, so that a slow minute of the machine hits all of them, and
medians over the repeats are compared. Each worker has one thread.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["MNEMOC_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mnemoc.runtime import Engine, Request, Sampling

RESULTS = Path(__file__).parent / "results"
SMALL_MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
}
"""A dense decoder that one core steps through in some milliseconds: fields of its config.json."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one request: to the first token, and the median between the tokens after it."""

    ttft_s: float
    tbt_s: float


def mnemoc(*arguments: object) -> str:
    """Run the command line; its stdout."""
    words = [sys.executable, "-m", "mnemoc", *map(str, arguments)]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"failed: {' '.join(words)}")
    return run.stdout


def make_model(directory: Path, **config: Any) -> Path:
    """A random-weight Llama with these changes to tiny-llama's config."""
    from mnemoc.ir.model import read_config

    source = directory.with_suffix(".json")
    source.write_text(json.dumps(read_config("tiny-llama") | config))
    mnemoc("init-model", source, directory, "--seed", 7)
    return directory


def make_plan(
    out: Path,
    model: Path,
    cluster: Path,
    layout: str,
    context: int,
    output_tokens: int,
    tbt: str = "60s",
) -> dict[str, Any]:
    """A plan with the layout pinned, within a TBT promise that bounds its chunks; its JSON."""
    degrees = dict(part.split("=") for part in layout.split(","))
    ranks = math.prod(int(degrees[axis]) for axis in ("tp", "spp", "kvp"))
    promise = ("--ttft", "10h", "--tbt", tbt, "--objective", "ttft")
    size = ("--context", context, "--output-tokens", output_tokens, "--gpus", ranks)
    pinned = ("--cluster", cluster, "--layout", layout, "-o", out, "--json")
    plan: dict[str, Any] = json.loads(mnemoc("plan", model, *pinned, *size, *promise))
    return plan


def prompt(tokens: int) -> tuple[int, ...]:
    """The same random bytes each time."""
    source = random.Random(tokens)
    return tuple(source.randrange(256) for _ in range(tokens))


@contextmanager
def engine(plan: Path, model: Path) -> Iterator[Callable[[tuple[int, ...], int], Timing]]:
    """A running plan, as a function from (prompt, tokens to generate) to its timing."""
    with Engine.start(plan, model) as running:

        def time_request(ids: tuple[int, ...], max_tokens: int) -> Timing:
            handle = running.submit(Request(ids, max_tokens, Sampling(ignore_eos=True)))
            handle.result()
            assert handle.ttft_s is not None
            return Timing(handle.ttft_s, statistics.median(handle.tbt_s))

        yield time_request


Contender = Callable[[], Timing]


def interleave(contenders: Mapping[str, Contender], repeats: int) -> dict[str, list[Timing]]:
    """Each contender once per repeat, in turn, after one that does not count."""
    timings: dict[str, list[Timing]] = {name: [] for name in contenders}
    for repeat in range(-1, repeats):
        for name, contend in contenders.items():
            timing = contend()
            say(f"  {name}: ttft {timing.ttft_s:.3f} s, tbt {timing.tbt_s * 1e3:.2f} ms")
            if repeat >= 0:
                timings[name].append(timing)
    return timings


def median_ttft_s(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.ttft_s for timing in timings)


def median_tbt_s(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.tbt_s for timing in timings)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` of them."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[1], 1),  # who else was at work
        "date": datetime.date.today().isoformat(),
    }


@dataclass(frozen=True)
class Figure:
    """One line of the report. aim: what the value is held against, in words."""

    name: str
    value: float
    unit: str
    aim: str
    detail: str


def ratio(name: str, over: float, under: float, aim: str, unit: str = "s") -> Figure:
    """One time over another, both in seconds."""
    scale = 1e3 if unit == "ms" else 1.0
    detail = f"{over * scale:.4g} {unit} over {under * scale:.4g} {unit}"
    return Figure(name, over / under, "×", aim, detail)


def write_report(name: str, title: str, figures: Sequence[Figure], runs: Mapping[str, Any]) -> None:
    """benchmarks/results/NAME.json with every run, NAME.md to read."""
    RESULTS.mkdir(exist_ok=True)
    where = machine()
    body = {"machine": where, "figures": [vars(figure) for figure in figures], "runs": runs}
    (RESULTS / f"{name}.json").write_text(_readable(body) + "\n")
    text = as_page(title, figures, where)
    (RESULTS / f"{name}.md").write_text(text)
    say(text)


def as_page(title: str, figures: Sequence[Figure], where: Mapping[str, Any]) -> str:
    """The report to read. where: as of `machine`"""
    host = ", ".join(f"{key} {value}" for key, value in where.items())
    rows = [f"| {f.name} | {f.value:.3g} {f.unit} | {f.aim} | {f.detail} |" for f in figures]
    table = ["| figure | measured | aim | from |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([f"# {title}", "", f"Measured on: {host}.", "", *table, ""])


def _readable(value: Any, indent: str = "") -> str:
    """JSON in which whatever holds nothing further is one line: a measurement, not a number; six digits."""
    entries = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (Mapping, list, tuple)) or not any(
        isinstance(entry, (Mapping, list, tuple)) for entry in entries
    ):
        return json.dumps(_rounded(value))
    deeper = indent + " "
    lines = [_readable(entry, deeper) for entry in entries]
    opening, closing = "[]"
    if isinstance(value, Mapping):
        lines = [f"{json.dumps(key)}: {line}" for key, line in zip(value, lines, strict=True)]
        opening, closing = "{}"
    body = f",\n{deeper}".join(lines)
    return f"{opening}\n{deeper}{body}\n{indent}{closing}"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def say(text: str) -> None:
    print(text, flush=True)
