"""KVP groups that share no request go at their own pace, in the schedule and in fact."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mnemoc.artifact import ChunkRule
from mnemoc.runtime import Engine, Progress, Request, Sampling, Token
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.scheduling.growth import Growth
from mnemoc.runtime.scheduling.islands import joined

GREEDY = Sampling(ignore_eos=True)
CONTEXT, CHUNK = 4096, 1024


@pytest.mark.parametrize(
    ("spans", "islands"),
    [
        ([], [{0}, {1}, {2}, {3}]),
        ([{2}], [{0}, {1}, {2}, {3}]),
        ([{3, 0}], [{0, 3}, {1}, {2}]),
        ([{0, 1}, {2, 3}], [{0, 1}, {2, 3}]),
        ([{0, 1}, {2, 3}, {1, 2}], [{0, 1, 2, 3}]),
    ],
)
def test_groups_with_a_request_in_common_are_one_island(
    spans: list[set[int]], islands: list[set[int]]
) -> None:
    found = joined(Growth(4, 16), map(frozenset, spans))
    assert sorted(map(sorted, found)) == sorted(map(sorted, islands))


def test_a_groups_decodes_go_on_while_another_is_in_the_midst_of_a_chunk(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> None:
    """In step, between two of the long prompt's chunks a conversation would get one token."""
    model = models("llama")
    plan = plans(
        model,
        kvp=2,
        stripe_tokens=CONTEXT,
        num_pages=300,
        context=CONTEXT,
        chunks=(ChunkRule(0, CONTEXT, CHUNK, 1, 1e-3),),
    )
    happened: list[str] = []
    with Engine.start(plan, model, nursery=nursery) as engine:
        chat = Request(tuple(range(30)), 2000, GREEDY)
        alone = engine.submit(Request(tuple(range(30)), 50, GREEDY)).result().tokens
        talking = engine.submit(
            chat, lambda event: happened.append("token") if isinstance(event, Token) else None
        )
        while not happened:  # so that the long one finds its home taken
            time.sleep(0.001)
        long = engine.submit(
            Request(tuple(i % 300 for i in range(4000)), 2, GREEDY),
            lambda event: happened.append("chunk" if isinstance(event, Progress) else "long"),
        )
        while "long" not in happened:
            time.sleep(0.001)
        talking.cancel()
        long.cancel()
    chunks = [at for at, what in enumerate(happened) if what == "chunk"]
    assert len(chunks) == 3
    between = [after - before - 1 for before, after in itertools.pairwise(chunks)]
    assert min(between) >= 4
    assert talking.tokens[:50] == alone
