"""One really long prompt through two stages, exact against transformers at sampled positions.

A 2-layer model keeps the quadratic work small enough for a laptop; the positions are the first ones,
powers of two and their neighbours (where chunks and pages end), random ones, and the last.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.units import format_duration

from .harness import Figure, make_model, make_plan, mnemoc, prompt, say, write_report

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 344,
}
NEW_TOKENS = 8


def sampled_positions(tokens: int) -> tuple[int, ...]:
    """Where the prompt's logits are compared; its last position is sampled from in any case."""
    powers = {2**i + d for i in range(tokens.bit_length()) for d in (-1, 0, 1)}
    source = random.Random(0)
    drawn = {source.randrange(tokens) for _ in range(64)}
    return tuple(sorted(p for p in powers | drawn | {0} if 0 <= p < tokens - 1))


def reference(model: Path, ids: tuple[int, ...], positions: tuple[int, ...]) -> torch.Tensor:
    """transformers' logits at the positions, in one pass over the whole text: no chunk, no cache."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        rows = torch.tensor(positions)
        return theirs(torch.tensor([ids]), use_cache=False, logits_to_keep=rows).logits[0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=262_144)
    tokens = options.parse_args().tokens
    with tempfile.TemporaryDirectory(prefix="mnemoc-long.") as folder:
        work = Path(folder)
        mnemoc("calibrate", "--cpu", "-o", work / "local.toml")
        model = make_model(work / "model", **MODEL)
        out = work / "plan"
        layout = "tp=1,spp=2,kvp=1"
        plan = make_plan(out, model, work / "local.toml", layout, tokens, NEW_TOKENS)
        ids, positions = prompt(tokens), sampled_positions(tokens)
        say(f"{tokens} tokens through 2 stages")
        with Engine.start(out, model) as engine:
            request = Request(ids, NEW_TOKENS, Sampling(ignore_eos=True), positions)
            handle = engine.submit(request).result()
        assert handle.ttft_s is not None
        say(f"  first token after {format_duration(handle.ttft_s)}")
        started = time.perf_counter()
        generated = handle.tokens
        extended = (*positions, *range(tokens - 1, tokens + NEW_TOKENS - 1))
        expected = reference(model, (*ids, *generated[:-1]), extended)
        say(f"  reference took {format_duration(time.perf_counter() - started)}")
    ours = torch.from_numpy(handle.logits.copy())
    difference = float((ours - expected).abs().max())
    greedy = expected[-NEW_TOKENS:].argmax(-1).tolist()
    agreeing = sum(a == b for a, b in zip(greedy, generated, strict=True))
    guess = plan["predicted"]["ttft_s"]
    compared = f"{len(extended)} positions of {tokens}, against transformers"
    figures = [
        Figure("largest logit difference", difference, "", "≤ 1e-4", compared),
        Figure("greedy tokens that agree", agreeing, f"of {NEW_TOKENS}", "all", "after the prompt"),
        Figure("time to first token", handle.ttft_s, "s", "-", f"{tokens} tokens, 2 stages"),
        Figure(
            "predicted over measured TTFT",
            guess / handle.ttft_s,
            "×",
            "0.75 to 1.25",
            f"{guess:.4g} s over {handle.ttft_s:.4g} s",
        ),
    ]
    write_report("long_context", "One long prompt", figures, {"plan": plan, "positions": extended})


if __name__ == "__main__":
    main()
