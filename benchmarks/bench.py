"""`make bench`: the figures of the README, as medians of interleaved runs with one thread a worker.

pipeline    TTFT of one request with 2 stages over 1, at 8 K tokens
reference   our unsharded prefill and decode against transformers (sdpa), same weights and threads
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .ceiling import ceilings
from .harness import (
    Contender,
    Timing,
    engine,
    interleave,
    make_model,
    make_plan,
    median_tbt_s,
    median_ttft_s,
    mnemoc,
    prompt,
    ratio,
    say,
    write_report,
)

PIPELINE_MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
}


def transformers_contender(model: Path, ids: tuple[int, ...], max_tokens: int) -> Contender:
    """Prefill with a cache and one row of logits, then greedy decode, on one thread."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def contend() -> Timing:
        started = time.perf_counter()
        step = theirs(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        token = step.logits[:, -1:].argmax(-1)
        ends = [time.perf_counter()]
        for _ in range(max_tokens - 1):
            step = theirs(token, past_key_values=step.past_key_values, use_cache=True)
            token = step.logits[:, -1:].argmax(-1)
            ends.append(time.perf_counter())
        between = [after - before for before, after in itertools.pairwise(ends)]
        return Timing(ends[0] - started, statistics.median(between))

    return contend


def bench_pipeline(work: Path, cluster: Path, tokens: int, repeats: int) -> dict[str, Any]:
    """Two stages, one stage and transformers, on the same prompt."""
    model = make_model(work / "pipeline", **PIPELINE_MODEL)
    ids, out = prompt(tokens), 32
    for p in (1, 2):
        make_plan(work / f"p{p}", model, cluster, f"tp=1,spp={p},kvp=1", tokens, out)
    with engine(work / "p1", model) as one, engine(work / "p2", model) as two:
        contenders = {
            "1 stage": lambda: one(ids, out),
            "2 stages": lambda: two(ids, out),
            "transformers": transformers_contender(model, ids, out),
        }
        timings = interleave(contenders, repeats)
    return {"tokens": tokens, "timings": timings}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=8192, help="prompt of the pipeline runs")
    options.add_argument("--repeats", type=int, default=5)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="mnemoc-bench.") as folder:
        work = Path(folder)
        cluster = work / "local.toml"
        say("measuring this machine")
        mnemoc("calibrate", "--cpu", "-o", cluster)
        say(f"pipeline and reference, {chosen.tokens} tokens")
        pipeline = bench_pipeline(work, cluster, chosen.tokens, chosen.repeats)
    ours, two, theirs = (
        pipeline["timings"][name] for name in ("1 stage", "2 stages", "transformers")
    )
    figures = [
        ratio("TTFT, 1 stage over 2", median_ttft_s(ours), median_ttft_s(two), "≥ 1.7"),
        ratio("prefill, transformers over ours", median_ttft_s(theirs), median_ttft_s(ours), "> 1"),
        ratio(
            "decode, transformers over ours", median_tbt_s(theirs), median_tbt_s(ours), "> 1", "ms"
        ),
        *ceilings(),
    ]
    write_report("bench", "Side by side", figures, {"pipeline": plain(pipeline)})


def plain(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part's runs as JSON values."""
    timings = {name: [vars(t) for t in runs] for name, runs in part["timings"].items()}
    return {**part, "timings": timings}


if __name__ == "__main__":
    main()
