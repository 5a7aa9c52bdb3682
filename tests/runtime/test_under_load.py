"""Everything at once: a crowd on too few pages, in every layout, and nobody gets another token than alone.

Requests are preempted, find one another's pages, swap them to host memory and back, grow over KVP groups and
are cancelled, all in the same run and all counted. `benchmarks/under_load.py` has 400 in each layout.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from mnemoc.runtime import Engine
from mnemoc.runtime.executor.workers import NurseryProcess

CROWD = Path(__file__).parents[2] / "benchmarks" / "crowd.py"
MOST = 200
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (60, {}),
    "stages and groups": (MOST, {"spp": 2, "kvp": 2}),
    "tensor parallel, groups": (40, {"tp": 2, "kvp": 2}),
    "helix": (40, {"kvp": 2, "ffn": "helix"}),
    "stages": (60, {"spp": 2}),
}


@pytest.fixture(scope="module")
def crowds() -> ModuleType:
    """benchmarks/crowd.py, which no wheel has."""
    spec = importlib.util.spec_from_file_location("crowd", CROWD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crowd"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(
    crowds: ModuleType,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
) -> list[list[int]]:
    """What each request gets on one rank that has room and nothing else to do."""
    model = models("llama")
    plan = plans(model, num_pages=128)
    with Engine.start(plan, model, nursery=nursery, prefix_caching=False) as engine:
        tokens: list[list[int]] = crowds.alone(engine, crowds.make_crowd(MOST))
    return tokens


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_crowd_gets_the_tokens_that_each_of_them_gets_alone(
    name: str,
    crowds: ModuleType,
    alone: list[list[int]],
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
) -> None:
    count, layout = LAYOUTS[name]
    groups = layout.get("kvp", 1)
    model = models("llama")
    plan = plans(
        model,
        **layout,
        num_pages=48 // groups,
        host_pages=40,
        max_batch=12,
        max_rows=72,
        **({"stripe_tokens": 48} if groups > 1 else {}),
    )
    crowd = crowds.make_crowd(MOST)[:count]
    with Engine.start(plan, model, nursery=nursery) as engine:
        handles = crowds.serve(engine, crowd)
        counts, swapped, stats = engine.counts, engine.swapped, engine.stats
        assert engine.kv_used_fraction == 0
    assert crowds.wrong(handles, alone[:count]) == []
    assert counts.hit_tokens > 0
    assert swapped[0] > 0
    if count == MOST:  # of fewer, it is a matter of moments whether any has to go
        assert counts.preemptions > 0
        assert swapped[1] > 0
    assert stats.cancelled > 0
    assert stats.finished == count - stats.cancelled
    assert (counts.growths > 0) == (groups > 1)
    mixed = [i for i in stats.iterations if i.decodes and i.prefill_tokens]
    assert mixed, "no micro-batch mixed decodes with prefill chunks"


@pytest.mark.parametrize("name", ["stages and groups", "helix"])
def test_workers_that_die_amid_the_crowd_cost_nobody_a_token(
    name: str,
    crowds: ModuleType,
    alone: list[list[int]],
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
) -> None:
    model, count = models("llama"), 50
    limits = {"num_pages": 32, "max_batch": 12, "max_rows": 72, "stripe_tokens": 48}
    plan = plans(model, **LAYOUTS[name][1], **limits, host_pages=40)
    crowd = crowds.make_crowd(MOST)[:count]
    total = sum(map(len, alone[:count]))
    choose = random.Random(name)
    with Engine.start(plan, model, nursery=nursery) as engine:

        def kill() -> None:
            for share in (0.1, 0.3, 0.6):
                while engine.stats.generated_tokens < share * total or not engine.healthy:
                    time.sleep(0.001)
                choose.choice(psutil.Process(nursery.process.pid).children()).kill()

        killer = threading.Thread(target=kill)
        killer.start()
        handles = crowds.serve(engine, crowd)
        killer.join()
        assert engine.kv_used_fraction == 0
        assert engine.stats.deaths == 3
        assert engine.counts.replays > 3
    assert crowds.wrong(handles, alone[:count]) == []
