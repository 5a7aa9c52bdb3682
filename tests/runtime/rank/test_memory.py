"""What a plan says that a rank holds, against the tensors that are alive while its programs run.

Each rank runs alone in this process, with a process group that sends nothing: what it computes is noise, what
it allocates is not.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mnemoc.artifact import Plan, Workload
from mnemoc.ir.model import load_model
from mnemoc.layout import Layout
from mnemoc.planner import load_cluster, make_plan
from mnemoc.runtime.protocol.messages import Admission, Run, Step
from mnemoc.runtime.rank import comm, cores
from mnemoc.runtime.rank.settings import Settings
from mnemoc.runtime.rank.stage import Prepared, Stage
from mnemoc.runtime.rank.worker import PREPARED
from mnemoc.runtime.request import Sampling
from mnemoc.runtime.scheduling.growth import Growth
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Bytes of all tensors made under it that are still referred to, and the most there ever were."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._saw(tensor.untyped_storage())
        return result

    def _saw(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@dataclasses.dataclass
class Sent:
    """A send that is under way: it holds what it sends."""

    tensor: torch.Tensor

    def wait(self) -> None:
        pass


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers of any rank run in this process, and talk to nobody."""

    def join(layout: Layout, rank: int, backend: str, token: str) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.gpus)

    def send(tensor: torch.Tensor, *_: Any, **__: Any) -> Sent:
        return Sent(tensor)

    monkeypatch.setattr(comm, "_join", join)
    monkeypatch.setattr(cores, "settle", lambda *_: None)
    for module in (
        dist,
        distributed_c10d,
    ):  # the latter knows its own when it sends several at once
        monkeypatch.setattr(module, "isend", send)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def planned(model: Path, workload: Workload, layout: Layout, overlap: int | str) -> Plan:
    """A plan for CPU workers that are as quick as GPUs, and have room for a few pages more than promised."""
    h100 = load_cluster("dgx-h100")
    capacity = dataclasses.replace(h100.numbers["memory.capacity"], value=8e9)
    numbers = {**h100.numbers, "memory.capacity": capacity}
    cluster = dataclasses.replace(h100, target="cpu", numbers=numbers)
    pins = {**dataclasses.asdict(layout), "overlap": overlap}
    return make_plan(load_model(str(model)), cluster, workload, pinned=pins).plan


def admitted(plan: Plan, workload: Workload) -> list[Admission]:
    """All requests; where one group serves several, on pages that lie scattered."""
    total, growth = workload.context + workload.output_tokens, Growth.of(plan)
    groups = min(growth.kvp, math.ceil(total / plan.stripe_tokens))
    prompt = array("i", [1] * workload.context)
    free = [0] * growth.kvp
    come = []
    for id in range(workload.concurrency):
        home, pages = id * groups % growth.kvp, []
        for group in range(growth.kvp):
            count = math.ceil(growth.held(growth.shard(home, group), total) / plan.page_size)
            first, free[group] = free[group], free[group] + count
            pages.append(((first, count),) if growth.kvp > 1 else _scattered(first, count))
        come.append(Admission(id, home, total, Sampling(), "none", prompt, 0, 0, tuple(pages)))
    return come


def _scattered(first: int, count: int) -> tuple[Run, ...]:
    """Pages in several runs, none behind another."""
    middle = first + count // 2
    return (middle, first + count - middle), (first, middle - first)


def steps_of(plan: Plan, workload: Workload) -> list[Step]:
    """All prompts, one behind the other, with the decodes of those that are done; then decodes alone."""
    steps = [Step(0, admitted(plan, workload))]
    for id in range(workload.concurrency):
        at = 0
        while at < workload.context:
            rows = min(plan.chunk_at(at), workload.context - at)
            decodes = [(done, 1) for done in range(id)] if at == 0 else []
            steps.append(Step(len(steps), (), decodes, [(id, rows)]))
            at += rows
    everyone = [(id, 1) for id in range(workload.concurrency)]
    return [*steps, *(Step(len(steps) + i, (), everyone) for i in range(2))]


def held(directory: Path, model: Path, rank: int, plan: Plan, steps: list[Step]) -> tuple[int, int]:
    """Bytes of a rank's weights and KV pages, and the most that the steps needed beside them."""
    rank_of = Settings(rank, rank, plan.gpus, "", "", directory, model, 1)
    with torch.inference_mode():
        it = Stage(rank_of)
        weights = list(tree_leaves([vars(w) for w in it.weights.layers]))
        weights += [t for t in vars(it.weights).values() if isinstance(t, torch.Tensor)]
        caches = [cache for pair in it.kv for cache in pair]
        known = [*weights, *caches]
        fixed = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in known}
        with Alive(known) as alive:
            prepared: deque[Prepared] = deque()
            for step in [*steps, None]:
                ours = it.prepare(step) if step else None
                prepared += [ours] if ours else []
                if prepared and (len(prepared) == PREPARED or not step):
                    it.launch(prepared.popleft())
    if dist.is_initialized():
        dist.destroy_process_group()
    return sum(fixed.values()), alive.peak


LAYOUTS = [
    (Layout(1, 1, 1), "off"),
    (Layout(2, 1, 1), "off"),
    (Layout(1, 3, 1), "off"),
    (Layout(1, 1, 3), "off"),
    (Layout(1, 1, 3), 64),
    (Layout(2, 1, 2, "helix"), "off"),
    (Layout(2, 1, 2, "helix"), 64),
    (Layout(2, 2, 2), "off"),
]


@pytest.mark.parametrize(("layout", "overlap"), LAYOUTS, ids=str)
@pytest.mark.parametrize(("family", "concurrency"), [("llama", 1), ("qwen3", 3)])
def test_a_rank_holds_what_the_plan_says(
    family: str,
    concurrency: int,
    layout: Layout,
    overlap: int | str,
    models: Any,
    compiled: Any,
    lonely: None,
) -> None:
    """Weights and KV to the byte; no more than what is said of a step, and not much less."""
    workload = Workload(10_000, 1e3, 1e3, output_tokens=8, concurrency=concurrency)
    model = models(family, num_hidden_layers=3 * layout.spp)  # of fewer, stages need less
    plan = planned(model, workload, layout, overlap)
    directory, steps = compiled(model, plan, workload), steps_of(plan, workload)
    places = [(stage, group) for stage in range(layout.spp) for group in range(layout.kvp)]
    found = [held(directory, model, layout.rank(*place, 0), plan, steps) for place in places]
    said = plan.memory
    planned_bytes = said.weights_bytes + said.kv_bytes + said.room_kv_bytes
    assert max(fixed for fixed, _ in found) == planned_bytes
    needed = max(peak for _, peak in found)
    promised = said.activation_bytes + said.workspace_bytes + said.communication_bytes
    error = promised / needed - 1
    assert 0 <= error < 0.15, f"{promised} said of {said.step}, {needed} needed: {error:+.1%}"
