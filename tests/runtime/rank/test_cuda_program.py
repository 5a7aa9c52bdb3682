"""The emitted CUDA programs, whole, on the CPU: Triton's interpreter runs their kernels on CPU tensors.

A rank is replayed alone as on a GPU, but for CUDA graphs: with real batches, page tables and stripes.
"""

from __future__ import annotations

import importlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from mnemoc.layout import Layout
from mnemoc.runtime.measuring.replay import Replay
from mnemoc.runtime.measuring.walk import Asked, MicroBatch
from mnemoc.runtime.protocol.messages import Admission, Step
from mnemoc.runtime.rank import stage
from mnemoc.runtime.request import Sampling

PROMPT = tuple(37 * i % 256 for i in range(3, 27))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for GPUs run on the CPU, and nothing is compiled ahead of time."""
    emit = importlib.import_module("mnemoc.codegen.emit")
    monkeypatch.setattr(emit, "compile_kernels", lambda *_: {})
    monkeypatch.setattr(stage, "_device", lambda *_: torch.device("cpu"))


def logits_of(plan: Path, model: Path) -> npt.NDArray[np.float32]:
    """Of a prompt in two chunks, and of two decodes behind it."""
    pages, ids = (((0, 2),),), array("i", PROMPT)
    request = Admission(7, 0, len(PROMPT) + 2, Sampling(), "all", ids, 0, 0, pages)
    steps = [
        Step(0, [request], (), [(7, 16)]),
        Step(0, (), (), [(7, len(PROMPT) - 16)]),
        *(Step(0, (), [(7, token)]) for token in (11, 12)),
    ]
    rows = []
    with Replay.open(plan, Asked(0, model, len(PROMPT), pages=8)) as replay, torch.inference_mode():
        for step in steps:
            prepared = replay.stage.prepare(step)
            launched = replay.stage.launch(prepared) if prepared else None
            assert launched is not None
            for *_, data in replay.stage.finish(launched).logits:
                rows.append(np.frombuffer(data, np.float32).reshape(-1, 320))
    return np.concatenate(rows)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_both_targets_give_the_same_logits(family: str, models: Any, plans: Any) -> None:
    model = models(family, num_hidden_layers=2)
    cpu, cuda = (logits_of(plans(model, target=t), model) for t in ("cpu", "cuda:sm_90"))
    assert cpu.shape == (len(PROMPT) + 2, 320)
    np.testing.assert_allclose(cuda, cpu, atol=1e-4)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_lone_rank_computes_the_same_by_nccl_and_in_one_shot(
    models: Any, plans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, for nobody adds to its part either way: of a chunk in halves, and of decodes."""
    model, results = models(num_hidden_layers=1), []
    kind = {"target": "cuda:sm_90", "dtype": "bfloat16", "stripe_tokens": 16, "overlap_rows": 8}
    for rows in (0, 12):
        plan = plans(model, tp=2, kvp=2, one_shot_rows=rows, **kind)
        torch.manual_seed(0)  # of the prompt
        with Replay.open(plan, Asked(1, prompt=40, decodes=2)) as replay:
            assert (replay.stage.comm.shared is not None) == (rows > 0)
            noted: list[torch.Tensor] = []
            monkeypatch.setattr(replay.stage, "_step", noting(replay.stage._step, noted))
            replay.execute(MicroBatch("prefill", 20, 20))
            replay.execute(MicroBatch("decode", 2, 40))
        results.append([result for result in noted if result is not None])
    nccl, one_shot = results
    assert nccl
    assert all(torch.equal(a, b) for a, b in zip(nccl, one_shot, strict=True))


def noting(step: Any, results: list[Any]) -> Any:
    """The step, with its results kept."""

    def noted(*given: Any) -> Any:
        results.append(step(*given))
        return results[-1]

    return noted


LAYOUTS = [Layout(2, 2, 2), Layout(2, 1, 2, "helix")]


@pytest.mark.parametrize("overlap_rows", [0, 8], ids=["whole", "halves"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_stage_and_group_runs_in_half_precision(
    layout: Layout,
    overlap_rows: int,
    models: Any,
    plans: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results: list[torch.Tensor] = []
    model = models(num_hidden_layers=2)
    degrees = {"tp": layout.tp, "spp": layout.spp, "kvp": layout.kvp, "ffn": layout.ffn}
    kind = {"target": "cuda:sm_90", "dtype": "bfloat16", "overlap_rows": overlap_rows}
    plan = plans(model, stripe_tokens=16, **kind, **degrees)
    for stage_number in range(layout.spp):
        for group in range(layout.kvp):
            rank = layout.rank(stage_number, group, 1)
            with Replay.open(plan, Asked(rank, prompt=40, decodes=2)) as replay:
                monkeypatch.setattr(replay.stage, "_step", noting(replay.stage._step, results))
                replay.execute(MicroBatch("prefill", 20, 20))  # ends a stripe, and begins one
                replay.execute(MicroBatch("decode", 2, 40))
    made = [result for result in results if result is not None]
    assert len(made) >= 2 * layout.spp
    assert all(bool(result.isfinite().all()) and bool(result.any()) for result in made)


@pytest.mark.parametrize("ffn", ["repeated", "helix"])
def test_one_half_is_on_its_way_before_the_other_is_computed(
    ffn: str, models: Any, plans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which a layer launches them, and each is merged only where it is read."""
    model = models(num_hidden_layers=1)
    kind = {"target": "cuda:sm_90", "dtype": "bfloat16", "overlap_rows": 8}
    plan = plans(model, kvp=2, ffn=ffn, stripe_tokens=16, **kind)
    launched: list[str] = []
    with Replay.open(plan, Asked(0, prompt=40)) as replay:
        program = replay.stage.program
        for owner, name in (
            (program.attention_prefill, "attention_prefill"),
            (program.collectives, "exchange"),
            (program.collectives, "merge_sent"),
            (program, "swiglu"),
        ):
            monkeypatch.setattr(owner, name, told(name, getattr(owner, name), launched))
        replay.execute(MicroBatch("prefill", 20, 20))
    attend, rest = "attention_prefill", ["merge_sent", "swiglu"]
    assert launched == [attend, "exchange", attend, "exchange", *rest, *rest]
    prefill = program.attention_prefill
    assert 0 < prefill.LENT < prefill.PROGRAMS, "places are left to messages"


def told(name: str, call: Any, launched: list[str]) -> Any:
    def noted(*given: Any) -> Any:
        launched.append(name)
        return call(*given)

    return noted
