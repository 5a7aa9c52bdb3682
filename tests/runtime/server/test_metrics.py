"""What /metrics says of an engine that has too few pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.server.metrics import Metrics
from mnemoc.runtime.workers import NurseryProcess


def test_preemptions_and_swaps_are_counted(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> None:
    """Two requests that need more pages than there are, once they have grown."""
    model = models("llama")
    sampling = Sampling(ignore_eos=True)
    with Engine.start(plans(model, num_pages=12, context=200), model, nursery=nursery) as engine:
        metrics = Metrics(engine, "llama")
        handles = [engine.submit(Request([7 + i] * 64, 60, sampling)) for i in range(2)]
        for handle in handles:
            handle.result()
        text = metrics.render().decode()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    values = {name.partition("{")[0].removeprefix("mnemoc:"): v for name, v in samples.items()}
    assert float(values["num_preemptions_total"]) == 1
    assert float(values["kv_pages_swapped_out_total"]) == 0, "the plan has no host pages"
    assert float(values["prompt_tokens_total"]) > 128, "what is computed again is counted again"
    assert float(values["prefix_cache_queries_total"]) == 128, "but not looked for again"
    assert float(values["kv_cache_usage_perc"]) == 0
