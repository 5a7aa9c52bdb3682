"""One engine of four workers, asked in every way that a client can ask."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mnemoc.artifact import ChunkRule
from mnemoc.errors import BadInput
from mnemoc.folder import load_artifact, write_artifact
from mnemoc.runtime import Engine, Handle, Progress, Request, Sampling, Token
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.request import Ended, Event

GREEDY = Sampling(ignore_eos=True)
PROMPT = tuple(range(1, 201))


def test_chunks_follow_one_another_through_the_stages_without_gaps(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> None:
    """Two stages that sleep for as long as a chunk would take: m chunks take m + 1 naps, not 2·m.

    The best of three: the machine may be busy. The first test: a nursery serves one engine after another.
    """
    nap_s, num_chunks = 0.05, 12
    model = models("llama")
    directory = plans(model, spp=2, chunks=(ChunkRule(0, 4096, 10, 1, nap_s),))
    manifest, files = load_artifact(directory)
    for role in ("stage_0", "stage_1"):
        path = f"schedule/{role}.py"
        lines = files[path].decode().splitlines(keepends=True)
        at = next(i for i, text in enumerate(lines) if text.startswith("    decode = ")) + 1
        lines.insert(at, f"    __import__('time').sleep({nap_s})\n")
        files[path] = "".join(lines).encode()
    write_artifact(directory, manifest, files)
    with Engine.start(directory, model, nursery=nursery) as engine:
        asked = [Request((token,) * 10 * num_chunks, 1) for token in (1, 2, 3)]
        ttft_s = min(engine.submit(request).result().ttft_s or 0.0 for request in asked)
    assert (num_chunks + 1) * nap_s <= ttft_s < 1.5 * num_chunks * nap_s


@pytest.fixture(scope="module")
def engine(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> Iterator[Engine]:
    model = models("qwen3")
    with Engine.start(plans(model, spp=2, kvp=2), model, nursery=nursery) as running:
        yield running


def test_events_tell_progress_then_tokens(engine: Engine) -> None:
    handle = engine.submit(Request(PROMPT, 5, GREEDY))
    events = list(handle.events())
    progress = [event for event in events if isinstance(event, Progress)]
    tokens = [event for event in events if isinstance(event, Token)]
    assert events == [*progress, *tokens]
    assert [event.done for event in progress] == [48, 96, 116, 136, 156, 176, 196]
    assert all(event.total == 200 for event in progress)
    assert all(event.eta_s >= 0 for event in progress)
    assert [event.index for event in tokens] == [0, 1, 2, 3, 4]
    assert [event.finish for event in tokens] == [None] * 4 + ["length"]
    assert handle.tokens == [event.id for event in tokens]


def test_a_handle_measures_times_and_can_be_read_again(engine: Engine) -> None:
    handle = engine.submit(Request(PROMPT, 6, GREEDY))
    assert len(list(handle)) == 6
    assert handle.result().finish_reason == "length"
    assert handle.ttft_s is not None
    assert handle.ttft_s > 0
    assert len(handle.tbt_s) == 5
    assert sum(handle.tbt_s) + handle.ttft_s <= time.monotonic() - handle.submitted_s


def test_stop_tokens_end_an_answer_but_not_too_early(engine: Engine) -> None:
    free = engine.submit(Request(PROMPT, 20, GREEDY)).result().tokens
    stop = frozenset({free[6]})
    first = free.index(free[6])
    stopped = engine.submit(Request(PROMPT, 20, Sampling(stop_ids=stop))).result()
    assert (stopped.tokens, stopped.finish_reason) == (free[: first + 1], "stop")
    later = Sampling(stop_ids=stop, min_tokens=first + 2, ignore_eos=True)
    assert len(engine.submit(Request(PROMPT, 20, later)).result().tokens) > first + 1


def test_logits_come_for_the_positions_asked_for(engine: Engine) -> None:
    rows = {
        ask: engine.submit(Request(PROMPT, 3, GREEDY, logits=ask)).result().logits
        for ask in ("none", "last", "all", (100, 7, 95))
    }
    shapes = {ask: len(logits) for ask, logits in rows.items()}
    assert shapes == {"none": 0, "last": 3, "all": 202, (100, 7, 95): 6}
    everything = rows["all"]
    assert everything.shape[1] == engine.vocab
    assert np.allclose(rows["last"], everything[199:], atol=1e-5)
    assert np.allclose(rows[(100, 7, 95)][:3], everything[[7, 95, 100]], atol=1e-5)


def test_a_cancelled_request_frees_its_pages_and_disturbs_nobody(engine: Engine) -> None:
    expected = engine.submit(Request(PROMPT, 30, GREEDY)).result().tokens
    doomed = [engine.submit(Request(PROMPT[::-1], 600, GREEDY)) for _ in range(2)]
    kept = engine.submit(Request(PROMPT, 30, GREEDY))
    next(iter(doomed[0]))
    for handle in doomed:
        handle.cancel()
        handle.cancel()
    again = engine.submit(Request(PROMPT, 30, GREEDY))
    assert kept.result().tokens == again.result().tokens == expected
    assert doomed[0].result().finish_reason == "cancelled"
    assert engine.kv_used_fraction == 0


def test_a_request_that_can_never_run_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(BadInput, match=r"the prompt has 2,049 tokens, the plan is for 2.05K"):
        engine.submit(Request((1,) * 2049))
    with pytest.raises(BadInput, match="KV pages of a group, the plan has"):
        engine.submit(Request((1,) * 2000, 200))
    with pytest.raises(BadInput, match=r"token ids lie in 0\.\.319"):
        engine.submit(Request((1, 320)))


def test_logits_are_in_order_of_positions_whichever_group_is_heard_of_first() -> None:
    """Two KVP groups answer for rows of one request, of one micro-batch too if its chunk is in two halves."""
    handle = Handle(Request((1, 2)), 0, 0.0, lambda message: True, None, 2)
    rows = np.array([[position, -position] for position in range(4)], dtype=np.float32)
    for first, stop in ((3, 4), (1, 3), (0, 1)):
        handle.logits_bytes[first] = rows[first:stop].tobytes()
    assert handle.logits.tolist() == rows.tolist()


def test_who_listens_and_a_request_that_is_over_do_not_keep_each_other(engine: Engine) -> None:
    """A prompt may have a million tokens, and the collector comes seldom."""

    class Listener:
        """As the server has them: they know the handle of what they listen to."""

        def __init__(self, request: Request) -> None:
            self.over = threading.Event()
            self.handle = engine.submit(request, self.hear)

        def hear(self, event: Event) -> None:
            if isinstance(event, Ended) or (isinstance(event, Token) and event.finish is not None):
                self.over.set()

    listeners = [Listener(Request((1, 2, 3), tokens)) for tokens in (1, 3, 1000)]
    handles = [weakref.ref(listener.handle) for listener in listeners]
    gc.disable()
    try:
        listeners[-1].handle.cancel()
        for listener in listeners:
            assert listener.over.wait(60)
        listeners.clear()
        del listener
        # workers hear of who is over with the next step
        engine.submit(Request((1, 2, 3), 1)).result()
        deadline_s = time.monotonic() + 10
        while any(handle() is not None for handle in handles):
            assert time.monotonic() < deadline_s, "something holds it still"
            time.sleep(0.01)
    finally:
        gc.enable()
