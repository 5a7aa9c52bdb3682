"""Predicted over measured TTFT and time between tokens on this machine, after `mnemoc calibrate`.

Layouts of one and two ranks, contexts from 2 K to 32 K, and chunk sizes that different TBT promises lead to.
In each round the machine is measured anew, then each configuration is planned with those figures, run alone
with one thread a worker, and held against its own plan: a virtual machine may be a third faster in one minute
than in another. The median over the rounds counts.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import (
    SMALL_MODEL,
    Figure,
    engine,
    make_model,
    make_plan,
    mnemoc,
    prompt,
    say,
    write_report,
)

LONG = {  # much KV per token and little else
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
MODELS = {"dense": SMALL_MODEL, "long": LONG}
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


def measure(case: Configuration, work: Path, cluster: Path) -> dict[str, Any]:
    """What its plan predicts with these figures of the machine, and one run of it, after a warm-up."""
    model, folder = work / case.model, work / f"{cluster.stem} {case}"
    plan = make_plan(folder, model, cluster, case.layout, case.tokens, OUT, tbt=case.tbt)
    ids = prompt(case.tokens)
    with engine(folder, model) as request:
        request(ids[:600], 2)
        timing = request(ids, OUT)
    shutil.rmtree(folder)
    predicted = {what: plan["predicted"][what] for what in ("ttft_s", "tbt_s")}
    say(f"{case}: predicted {predicted}, measured {vars(timing)}")
    chunks = [rule["chunk"] for rule in plan["chunks"]]
    return {"predicted": predicted, "measured": vars(timing), "chunks": chunks}


def figures(runs: Mapping[Configuration, list[dict[str, Any]]]) -> list[Figure]:
    """Predicted over measured, each the median over the rounds; then the median and the worst error."""
    found = []
    for case, rounds in runs.items():
        for what in ("ttft", "tbt"):
            pairs = [(r["predicted"][f"{what}_s"], r["measured"][f"{what}_s"]) for r in rounds]
            ratios = [guess / got for guess, got in pairs]
            times = ", ".join(f"{guess * 1e3:.4g} over {got * 1e3:.4g}" for guess, got in pairs)
            sizes = [chunk for r in rounds for chunk in r["chunks"]]
            detail = f"{times} ms, chunks {max(sizes)} to {min(sizes)}"
            title = f"{what.upper()}, {case}"
            found.append(Figure(title, statistics.median(ratios), "×", "0.75 to 1.25", detail))
    errors = [100 * abs(figure.value - 1) for figure in found]
    detail = f"of {len(errors)} predictions"
    return [
        Figure("median error", statistics.median(errors), "%", "≤ 10", detail),
        Figure("worst error", max(errors), "%", "≤ 25", detail),
        *found,
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3, help="over all configurations")
    chosen = options.parse_args()
    runs: dict[Configuration, list[dict[str, Any]]] = {case: [] for case in CONFIGURATIONS}
    clusters = []
    with tempfile.TemporaryDirectory(prefix="mnemoc-predictions.") as folder:
        work = Path(folder)
        for name, config in MODELS.items():
            make_model(work / name, **config)
        for number in range(1, chosen.rounds + 1):
            say(f"round {number}: measuring this machine")
            cluster = work / f"local{number}.toml"
            mnemoc("calibrate", "--cpu", "-o", cluster)
            clusters.append(cluster.read_text())
            for case in CONFIGURATIONS:
                runs[case].append(measure(case, work, cluster))
    details = {"runs": {str(case): rounds for case, rounds in runs.items()}, "clusters": clusters}
    write_report("predictions", "Predicted over measured", figures(runs), details)


if __name__ == "__main__":
    main()
