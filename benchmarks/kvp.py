"""Time between tokens behind a long context with 2 KVP groups over 1, one thread a worker.

One layer with the attention of Llama-3.1 405B and little else: at millions of tokens, attention is nearly all
that a decode does, as it is here. Each engine prefills the prompt, then decodes: minutes each.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .harness import Timing, engine, make_model, make_plan, mnemoc, prompt, ratio, say, write_report

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
NEW_TOKENS = 128


def measure(work: Path, model: Path, groups: int, tokens: int) -> Timing:
    """One request through a plan for so many groups."""
    plan = work / f"k{groups}"
    layout = f"tp=1,spp=1,kvp={groups},ffn=repeated"
    make_plan(plan, model, work / "local.toml", layout, tokens, NEW_TOKENS)
    with engine(plan, model) as request:
        request(prompt(600), 2)
        timing = request(prompt(tokens), NEW_TOKENS)
    say(f"  kvp={groups}: ttft {timing.ttft_s:.3f} s, tbt {timing.tbt_s * 1e3:.2f} ms")
    return timing


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=32768)
    tokens = options.parse_args().tokens
    with tempfile.TemporaryDirectory(prefix="mnemoc-kvp.") as folder:
        work = Path(folder)
        mnemoc("calibrate", "--cpu", "--quick", "-o", work / "local.toml")
        model = make_model(work / "model", **MODEL)
        one, two = (measure(work, model, groups, tokens) for groups in (1, 2))
    title = f"TBT behind {tokens} tokens, 1 KVP group over 2"
    figures = [
        ratio(title, one.tbt_s, two.tbt_s, "≥ 1.5", "ms"),
        ratio("TTFT, 1 KVP group over 2", one.ttft_s, two.ttft_s, "-"),
    ]
    write_report("kvp", "Two KVP groups", figures, {"1": vars(one), "2": vars(two)})


if __name__ == "__main__":
    main()
