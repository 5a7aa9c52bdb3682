"""Captured steps: whatever a replay does not take from its own tensors would show.

There is no GPU here, so a "graph" is the call itself, made again on the tensors that were captured: what a
graph would have baked in (numbers of the host, other tensors) is baked in here too.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mnemoc.microbatch import Exchange, Second, Segments
from mnemoc.runtime.protocol.messages import Admission, Done, Step
from mnemoc.runtime.rank import cores, graphs
from mnemoc.runtime.rank.graphs import Graphs, Result
from mnemoc.runtime.rank.settings import Settings
from mnemoc.runtime.rank.stage import Stage
from mnemoc.runtime.request import Sampling


class Calls:
    """A stand-in of the CUDA capture. captured: how often; replayed: how often."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        self.captured += 1
        result = run()

        def replay() -> None:
            self.replayed += 1
            fresh = run()
            if result is not None and fresh is not None:
                result.copy_(fresh)

        return replay, result


def alone(directory: Path, model: Path) -> Stage:
    """The one rank of a plan for one rank."""
    return Stage(Settings(0, 0, 1, "", "", directory, model, 1))


def admission(id: int, tokens: list[int]) -> Admission:
    pages, ids = (((20 * id, -(-(len(tokens) + 40) // 16)),),), array("i", tokens)
    return Admission(id, 0, len(tokens) + 40, Sampling(), "last", ids, 0, 0, pages)


def traffic() -> list[Step]:
    """Prompts of several lengths in chunks of 24 that come again, alone and beside decodes; then decodes."""
    prompts = [[(7 * i + id) % 300 for i in range(length)] for id, length in enumerate((240, 205))]
    steps = [Step(i, [], [], [(0, 24)]) for i in range(10)]
    steps += [Step(10 + i, [], [(0, 5 + i)], [(1, 24 if i < 8 else 13)]) for i in range(9)]
    steps += [Step(19 + i, [], [(0, 14 + i), (1, 8 + i)]) for i in range(6)]
    for first, id in ((0, 0), (10, 1)):
        come = [admission(id, prompts[id])]
        steps[first] = Step(first, come, steps[first].decodes, steps[first].chunks)
    return steps


def run(stage: Stage, steps: list[Step]) -> list[Done]:
    done = []
    for step in steps:
        prepared = stage.prepare(step)
        assert prepared is not None
        launched = stage.launch(prepared)
        assert launched is not None
        done.append(stage.finish(launched))
    return done


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_replayed_steps_give_what_eager_ones_do(
    family: str,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "settle", lambda *_: None)
    model = models(family)
    directory, calls = plans(model), Calls()
    with torch.inference_mode():
        eager, replayed = alone(directory, model), alone(directory, model)
        monkeypatch.setattr(replayed, "_step", Graphs(replayed._run, calls))
        expected, found = run(eager, traffic()), run(replayed, traffic())
    assert [(done.number, done.tokens) for done in found] == [
        (done.number, done.tokens) for done in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        for (*_, rows), (*_, same) in zip(ours.logits, theirs.logits, strict=True):
            both = (np.frombuffer(logits, dtype=np.float32) for logits in (rows, same))
            np.testing.assert_allclose(*both, rtol=0, atol=1e-5)
    assert calls.captured >= 3, "whole chunks, chunks beside a decode, decodes"
    assert calls.replayed > calls.captured


def test_results_of_a_graph_are_not_overwritten_by_its_next_replay() -> None:
    steps = Graphs(lambda batch: batch.ids * 2, Calls())
    results = [steps(_batch(torch.full((4,), i))) for i in range(4)]
    assert [result[0].item() for result in results if result is not None] == [0, 2, 4, 6]


def test_a_replay_reads_its_own_second_half() -> None:
    def batch(past: int) -> graphs.Batch:
        numbers = torch.full((1,), past, dtype=torch.int32)
        segments = Segments(torch.tensor([0, 2]), numbers, numbers, numbers[None], 2, 9)
        second = Second(2, segments, (Exchange(1, numbers.long(), numbers.long()),))
        return dataclasses.replace(_batch(torch.zeros(5)), second=second)

    def step(batch: graphs.Batch) -> torch.Tensor:
        assert batch.second is not None
        (swap,) = batch.second.exchange
        return batch.second.prefill.past + 10 * swap.sent + 100 * swap.received

    calls = Calls()
    steps = Graphs(step, calls)
    results = [steps(batch(past)) for past in (1, 2, 3)]
    assert [result.item() for result in results if result is not None] == [111, 222, 333]
    assert (calls.captured, calls.replayed) == (1, 2)


def test_the_graph_that_was_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    calls = Calls()
    steps = Graphs(lambda batch: batch.ids, calls)
    for rows in (1, 1, 2, 1, 3, 1, 2, 2):
        steps(_batch(torch.zeros(rows)))
    assert calls.captured == 2, "of one row, and of two when they came again after they had gone"
    assert calls.replayed == 4


def _batch(ids: torch.Tensor) -> graphs.Batch:
    none = torch.empty(0, dtype=torch.int64)
    return graphs.Batch(ids.long(), ids.long(), ids.long(), none, 0, None, None, ())
