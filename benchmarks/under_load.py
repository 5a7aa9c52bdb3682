"""200 requests at once on too few pages, in every layout: each gets the tokens that it gets alone.

Preemption, prefix hits, swaps to host memory, KVP growth and cancellation all occur, and are counted. With
them come 200 more that go on where these end: what was asked and answered before is their prompt. Greedy
tokens are held against transformers too. Nothing is timed, so machines are invented that have devices enough
and copy pages quickly.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mnemoc.folder import load_artifact, write_artifact
from mnemoc.runtime import Engine

from .crowd import Asked, alone, follow_ups, make_crowd, serve, wrong
from .harness import Figure, make_model, make_plan, say, write_report

LAYOUTS = (
    "tp=1,spp=1,kvp=1",
    "tp=1,spp=2,kvp=1",
    "tp=1,spp=2,kvp=2,ffn=repeated",
    "tp=2,spp=1,kvp=2,ffn=repeated",
    "tp=1,spp=1,kvp=2,ffn=helix",
)
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
}
CONTEXT, OUTPUT = 896, 96
PAGES = 64  # of 16 tokens, of all groups together


def invented_cluster(path: Path) -> Path:
    """The shipped `local` with four devices whose pages reach the host sooner than they are computed."""
    text = files("mnemoc.planner").joinpath("clusters", "local.toml").read_text()
    for old, new in (
        ('devices_per_node = { value = "auto"', "devices_per_node = { value = 4"),
        (
            "[host]  # the same memory once more; latency of a layer's pages\nlatency = { value = 40",
            "[host]\nlatency = { value = 1",
        ),
    ):
        assert old in text, f"{old!r} is not in local.toml"
        text = text.replace(old, new)
    path.write_text(text)
    return path


def tight_plan(out: Path, model: Path, cluster: Path, layout: str) -> Path:
    """A plan with less room than it would have: in memory, in a micro-batch, and in a stripe."""
    make_plan(out, model, cluster, layout, CONTEXT, OUTPUT)
    manifest, contents = load_artifact(out)
    plan = manifest.plan
    groups, page = plan.layout.kvp, plan.page_size
    plan = dataclasses.replace(
        plan,
        num_pages=PAGES * 16 // page // groups,
        host_pages=40,
        max_batch=12,
        max_rows=72,
        stripe_tokens=plan.stripe_tokens if groups == 1 else -(-48 // page) * page,
    )
    write_artifact(out, dataclasses.replace(manifest, plan=plan), contents)
    return out


def disagreeing(model: Path, crowd: Sequence[Asked], tokens: Sequence[Sequence[int]]) -> int:
    """Greedy requests of which transformers' greedy tokens differ anywhere."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
    differing = 0
    for asked, ours in zip(crowd, tokens, strict=True):
        if asked.request.sampling.temperature:
            continue
        prompt = asked.request.prompt_ids
        with torch.inference_mode():
            logits = theirs(torch.tensor([(*prompt, *ours[:-1])])).logits[0, len(prompt) - 1 :]
        differing += logits.argmax(1).tolist() != list(ours)
    return differing


def measure(
    plan: Path, model: Path, crowd: Sequence[Asked], expected: Sequence[Sequence[int]]
) -> tuple[list[str], dict[str, int]]:
    """Requests that went wrong, and what happened meanwhile."""
    with Engine.start(plan, model) as engine:
        handles = serve(engine, crowd)
        swapped = engine.swapped
        counted = {
            **vars(engine.counts),
            "swapped out": swapped[0],
            "swapped in": swapped[1],
            "cancelled": engine.stats.cancelled,
        }
    return wrong(handles, expected), counted


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    crowd = make_crowd(chosen.requests, chosen.seed)
    figures: list[Figure] = []
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mnemoc-load.") as folder:
        work = Path(folder)
        cluster = invented_cluster(work / "invented.toml")
        model = make_model(work / "model", **MODEL)
        make_plan(work / "calm", model, cluster, LAYOUTS[0], CONTEXT, OUTPUT)
        say(f"{chosen.requests} requests, each alone")
        with Engine.start(work / "calm", model, prefix_caching=False) as engine:
            first = alone(engine, crowd)
            later_crowd = follow_ups(crowd, first)
            later = alone(engine, later_crowd)
        differing = disagreeing(model, [*crowd, *later_crowd], [*first, *later])
        greedy = sum(not a.request.sampling.temperature for a in (*crowd, *later_crowd))
        detail = f"of {greedy} greedy ones, each alone, against transformers"
        figures.append(Figure("requests with another token", differing, "", "0", detail))
        for layout in LAYOUTS:
            plan = tight_plan(work / layout, model, cluster, layout)
            say(f"{layout}: all at once")
            bad, counted = measure(plan, model, [*crowd, *later_crowd], [*first, *later])
            runs[layout] = {"wrong": bad, "counted": counted}
            told = ", ".join(f"{what.replace('_', ' ')} {n}" for what, n in counted.items())
            name = f"requests with another token, {layout}"
            detail = f"of {2 * chosen.requests} at once against alone; {told}"
            figures.append(Figure(name, len(bad), "", "0", detail))
    write_report("under_load", "Exactness under load", figures, runs)


if __name__ == "__main__":
    main()
