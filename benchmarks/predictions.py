"""Predicted over measured TTFT and time between tokens on this machine, after `mnemoc calibrate`.

Layouts of one and two ranks, contexts from 2 K to 32 K, and chunk sizes that different TBT promises lead to.
Each configuration is planned, run alone with one thread a worker, and held against its own plan. All of
them take turns in each round, and the best of the rounds counts: both sides mean an undisturbed machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    Figure,
    Timing,
    engine,
    make_model,
    make_plan,
    mnemoc,
    prompt,
    say,
    write_report,
)

DENSE = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
}
LONG = {  # much KV per token and little else
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
MODELS = {"dense": DENSE, "long": LONG}
OUT = 24  # tokens generated


@dataclass(frozen=True)
class Configuration:
    """A model, a layout, a prompt and the TBT promise that its chunks keep."""

    model: str
    layout: str
    tokens: int
    tbt: str

    def __str__(self) -> str:
        return f"{self.model} {self.layout} {self.tokens} tokens, TBT {self.tbt}"


CONFIGURATIONS = (
    Configuration("dense", "tp=1,spp=1,kvp=1", 2048, "60s"),
    Configuration("dense", "tp=1,spp=1,kvp=1", 8192, "60s"),
    Configuration("dense", "tp=1,spp=1,kvp=1", 4096, "60ms"),
    Configuration("dense", "tp=1,spp=2,kvp=1", 8192, "60s"),
    Configuration("dense", "tp=1,spp=2,kvp=1", 4096, "80ms"),
    Configuration("dense", "tp=2,spp=1,kvp=1", 4096, "60s"),
    Configuration("dense", "tp=1,spp=1,kvp=2", 8192, "60s"),
    Configuration("long", "tp=1,spp=1,kvp=1", 32768, "60s"),
    Configuration("long", "tp=1,spp=1,kvp=2", 32768, "60s"),
)


def plan_of(case: Configuration, work: Path, cluster: Path) -> dict[str, Any]:
    """Plan it into its own folder."""
    return make_plan(
        work / str(case), work / case.model, cluster, case.layout, case.tokens, OUT, tbt=case.tbt
    )


def measure(case: Configuration, work: Path) -> Timing:
    """One run of it, after a warm-up that does not count."""
    ids = prompt(case.tokens)
    with engine(work / str(case), work / case.model) as request:
        request(ids[:600], 2)
        return request(ids, OUT)


def held(case: Configuration, plan: dict[str, Any], timings: list[Timing]) -> dict[str, Any]:
    """What was predicted and what was measured, in seconds: of the rounds the best, as calibrate does."""
    return {
        "configuration": str(case),
        "chunks": [rule["chunk"] for rule in plan["chunks"]],
        "predicted": plan["predicted"],
        "measured": {
            "ttft_s": min(timing.ttft_s for timing in timings),
            "tbt_s": min(timing.tbt_s for timing in timings),
        },
        "rounds": [vars(timing) for timing in timings],
    }


def figures(runs: list[dict[str, Any]]) -> list[Figure]:
    """Predicted over measured, each, then the median and the worst of their errors."""
    found = []
    for one in runs:
        for what in ("ttft", "tbt"):
            guess, got = one["predicted"][f"{what}_s"], one["measured"][f"{what}_s"]
            chunks = f"chunks {max(one['chunks'])} to {min(one['chunks'])}"
            detail = f"{guess * 1e3:.4g} ms over {got * 1e3:.4g} ms, {chunks}"
            title = f"{what.upper()}, {one['configuration']}"
            found.append(Figure(title, guess / got, "×", "0.75 to 1.25", detail))
    errors = [100 * abs(figure.value - 1) for figure in found]
    detail = f"of {len(errors)} predictions"
    return [
        Figure("median error", statistics.median(errors), "%", "≤ 10", detail),
        Figure("worst error", max(errors), "%", "≤ 25", detail),
        *found,
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=2, help="over all configurations")
    options.add_argument("--cluster", type=Path, help="measured already; else measured first")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="mnemoc-predictions.") as folder:
        work = Path(folder)
        cluster = chosen.cluster or work / "local.toml"
        if chosen.cluster is None:
            say("measuring this machine")
            mnemoc("calibrate", "-o", cluster)
        for name, config in MODELS.items():
            make_model(work / name, **config)
        plans = {case: plan_of(case, work, cluster) for case in CONFIGURATIONS}
        timings: dict[Configuration, list[Timing]] = {case: [] for case in CONFIGURATIONS}
        for _ in range(chosen.rounds):
            for case in CONFIGURATIONS:
                timings[case].append(measure(case, work))
                said = plans[case]["predicted"]
                say(f"{case}: {said['ttft_s']:.4g}, {said['tbt_s']:.4g} s; {timings[case][-1]}")
        runs = [held(case, plans[case], timings[case]) for case in CONFIGURATIONS]
        text = cluster.read_text()
    write_report(
        "predictions", "Predicted over measured", figures(runs), {"runs": runs, "cluster": text}
    )


if __name__ == "__main__":
    main()
