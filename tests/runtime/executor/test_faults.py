"""What goes wrong, and what is left behind: nothing, but a sentence."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from mnemoc.errors import BadInput, MnemocError, RuntimeFault, UsageError
from mnemoc.runtime import Engine, Handle, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess, Workers
from mnemoc.runtime.flights import Flights

MakeModel = Callable[..., Path]
MakePlan = Callable[..., Path]
Sabotage = Callable[[Path, str], Path]
FOREVER = Request((1, 2, 3), 900, Sampling(ignore_eos=True))
LONG = Request((1, 2, 3), 200, Sampling(ignore_eos=True))


def workers_of(nursery: NurseryProcess) -> list[psutil.Process]:
    return psutil.Process(nursery.process.pid).children()


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("victim", [0, 3])
def test_when_a_worker_is_killed_what_runs_goes_on_where_it_stopped(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess, victim: int
) -> None:
    model = models("llama")
    plan = plans(model, spp=2, kvp=2, context=1000, stripe_tokens=500)
    drawn = Sampling(temperature=0.9, seed=3, repetition_penalty=1.2, ignore_eos=True)
    asked = (Request((1, 2, 3), 120, Sampling(ignore_eos=True)), Request((4, 5), 120, drawn))
    with Engine.start(plan, model, nursery=nursery) as engine:
        alone = [engine.submit(request).result().tokens for request in asked]
        running = [engine.submit(request) for request in asked]
        streams = [iter(handle) for handle in running]
        heard = [[next(stream) for _ in range(5)] for stream in streams]
        killed_s = time.monotonic()
        os.kill(workers_of(nursery)[victim].pid, signal.SIGKILL)
        assert until(lambda: engine.stats.deaths == 1, 5)
        queued = engine.submit(Request((5, 6, 7), 8))
        for i, stream in enumerate(streams):
            heard[i] += stream
        assert time.monotonic() - killed_s < 20
        assert [[token.id for token in tokens] for tokens in heard] == alone
        assert [[token.index for token in tokens] for tokens in heard] == [list(range(120))] * 2
        assert len(queued.result().tokens) == 8
        assert engine.healthy
        assert engine.kv_used_fraction == 0
        assert (engine.stats.restarts, engine.counts.replays, engine.stats.failed) == (1, 2, 0)


def test_logits_come_once_for_each_row_whatever_happens_meanwhile(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess
) -> None:
    model = models("llama")
    sampling = Sampling(ignore_eos=True, logprobs=2)
    asked = [Request(range(150), 30, sampling, wanted) for wanted in ("last", "all", (3, 70))]
    with Engine.start(plans(model, kvp=2), model, nursery=nursery) as engine:
        calm = [engine.submit(request).result() for request in asked]
        running = [engine.submit(request) for request in asked]
        for handle in running:
            next(iter(handle))
        os.kill(workers_of(nursery)[1].pid, signal.SIGKILL)
        for handle, before in zip(running, calm, strict=True):
            handle.result()
            assert handle.tokens == before.tokens
            assert handle.logits.shape == before.logits.shape
            np.testing.assert_allclose(handle.logits, before.logits, atol=1e-4)
            assert len(handle.logprobs) == 30
        assert engine.stats.restarts == 1


def test_requests_that_wait_for_pages_survive_a_restart(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess
) -> None:
    model = models("llama")
    with Engine.start(plans(model, num_pages=60), model, nursery=nursery) as engine:
        running = engine.submit(FOREVER)
        next(iter(running))
        waiting = engine.submit(Request((5,) * 950, 10, Sampling(ignore_eos=True)))
        assert until(lambda: engine.num_waiting == 1)
        assert (engine.num_running, engine.num_waiting) == (1, 1)
        os.kill(workers_of(nursery)[0].pid, signal.SIGKILL)
        assert len(running.result().tokens) == 900
        assert len(waiting.result().tokens) == 10


def test_the_death_of_the_workers_parent_is_survived_too(
    models: MakeModel, plans: MakePlan
) -> None:
    model = models("llama")
    private = NurseryProcess()
    try:
        with Engine.start(plans(model, spp=2), model, nursery=private) as engine:
            orphans = workers_of(private)
            running = engine.submit(LONG)
            next(iter(running))
            private.process.kill()
            assert len(running.result().tokens) == 200
            psutil.wait_procs(orphans, timeout=10)
            assert not any(process.is_running() for process in orphans)
    finally:
        private.close()


def test_a_parent_of_workers_that_hangs_is_replaced(
    models: MakeModel, plans: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, private = models("llama"), NurseryProcess()
    try:
        with Engine.start(plans(model), model, nursery=private) as engine:
            running = engine.submit(LONG)
            next(iter(running))
            parent, worker = private.process.pid, workers_of(private)[0].pid
            os.kill(parent, signal.SIGSTOP)
            monkeypatch.setattr("mnemoc.runtime.executor.workers.JOIN_S", 1.0)
            os.kill(worker, signal.SIGKILL)
            assert until(lambda: private.process.pid != parent)
            monkeypatch.setattr("mnemoc.runtime.executor.workers.JOIN_S", 60.0)
            assert len(running.result().tokens) == 200
    finally:
        private.close()


def test_a_parent_of_workers_has_one_engine_at_a_time(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess
) -> None:
    model = models("llama")
    plan = plans(model)
    first = Workers(plan, model, 1, nursery)
    with pytest.raises(UsageError, match="another engine has its workers from there"):
        Engine.start(plan, model, nursery=nursery)
    first.close()
    Workers(plan, model, 1, nursery).close()


def test_closing_ends_requests_and_workers(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess
) -> None:
    model = models("llama")
    engine = Engine.start(plans(model, tp=2), model, nursery=nursery)
    running = engine.submit(FOREVER)
    next(iter(running))
    engine.close()
    with pytest.raises(RuntimeFault, match="the engine was closed"):
        running.result()
    with pytest.raises(RuntimeFault, match="the engine was closed"):
        engine.submit(FOREVER)
    running.cancel()
    engine.close()
    assert until(lambda: not workers_of(nursery))


def test_a_request_that_kills_the_workers_fails_with_the_line_and_others_go_on(
    models: MakeModel, plans: MakePlan, sabotaged: Sabotage, nursery: NurseryProcess
) -> None:
    model, bomb = models("llama"), "1 / int((batch.ids != 300).all())  # !"
    quiet = Sampling(ignore_eos=True, logit_bias=((300, -100.0),))
    with Engine.start(sabotaged(plans(model), bomb), model, nursery=nursery) as engine:
        asked = [Request(range(i, 40 + i), 60, quiet) for i in range(3)]
        alone = [engine.submit(request).result().tokens for request in asked]
        others = [engine.submit(request) for request in asked]
        poison = engine.submit(Request((300,) * 70, 5))
        with pytest.raises(
            RuntimeFault, match=r"died \d times in a row over this.*ZeroDiv"
        ) as caught:
            poison.result()
        assert bomb in "".join(caught.value.__notes__)
        assert [handle.result().tokens for handle in others] == alone
        assert engine.stats.failed == 1
        assert engine.healthy


def test_a_plan_over_which_workers_always_die_is_given_up(
    models: MakeModel, plans: MakePlan, sabotaged: Sabotage, nursery: NurseryProcess
) -> None:
    model, bomb = models("llama"), "1 / (batch.pos.shape[0] - 3)"
    with Engine.start(sabotaged(plans(model), bomb), model, nursery=nursery) as engine:
        for _ in range(3):
            with pytest.raises(RuntimeFault, match="3 times in a row over this request"):
                engine.submit(FOREVER).result()
        assert not until(lambda: engine.healthy, 1)
        with pytest.raises(RuntimeFault, match="gave up: 3 requests in a row"):
            engine.submit(FOREVER)


ONCE = "import os; (flag := {!r}) and os.path.exists(flag) and (os.unlink(flag), {})"


@pytest.mark.parametrize(
    ("what", "limit_s", "story"),
    [
        ("(_ for _ in ()).throw(MemoryError('no more'))", 20.0, "MemoryError"),
        ("__import__('time').sleep(1000)", 1.0, "no step has ended for"),
        ("os.kill(os.getpid(), 19)", 20.0, "has given no sign of life"),
    ],
    ids=["out of memory", "a deadlock", "stopped"],
)
def test_workers_without_memory_or_at_a_standstill_are_replaced(
    models: MakeModel,
    plans: MakePlan,
    sabotaged: Sabotage,
    nursery: NurseryProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    limit_s: float,
    story: str,
) -> None:
    stories: list[str] = []
    replay = Flights.replay

    def heard(flights: Flights, error: MnemocError) -> bool:
        stories.append(str(error))
        return replay(flights, error)

    monkeypatch.setattr(Flights, "replay", heard)
    model, flag = models("llama"), tmp_path / "flag"
    plan = sabotaged(plans(model, spp=2), ONCE.format(str(flag), what))
    asked = Request(range(100), 120, Sampling(ignore_eos=True))
    with Engine.start(plan, model, nursery=nursery, step_timeout_s=limit_s) as engine:
        alone = engine.submit(asked).result().tokens
        running = engine.submit(asked)
        next(iter(running))
        flag.touch()
        started_s = time.monotonic()
        assert until(lambda: engine.stats.deaths == 1, 15)
        assert time.monotonic() - started_s < 20
        assert running.result().tokens == alone
    assert len(stories) == 1
    assert story in stories[0]


def test_weights_of_another_shape_reach_the_caller_as_one_sentence(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess
) -> None:
    plan = plans(models("llama"), tp=2)
    other = models("llama", intermediate_size=128)
    with pytest.raises(BadInput, match=r"gate_proj.* rows, the plan wants.*not the weights of"):
        Engine.start(plan, other, nursery=nursery)
    assert until(lambda: not workers_of(nursery))


def test_missing_weights_are_refused_before_any_worker_starts(
    models: MakeModel, plans: MakePlan, tmp_path: Path
) -> None:
    plan = plans(models("llama"))
    with pytest.raises(BadInput, match="no such directory of weights"):
        Engine.start(plan, tmp_path / "nowhere")
    shutil.copytree(models("llama"), tmp_path / "half")
    next((tmp_path / "half").glob("model-00002*.safetensors")).unlink()
    with pytest.raises(BadInput, match=r"the shard model-00002.* is missing"):
        Engine.start(plan, tmp_path / "half")


def test_a_tampered_plan_is_refused_before_any_of_it_runs(
    models: MakeModel, plans: MakePlan
) -> None:
    model = models("llama")
    plan = plans(model)
    with (plan / "cost.py").open("a") as file:
        file.write("raise SystemExit('ran')\n")
    with pytest.raises(BadInput, match=r"cost\.py: changed since it was planned"):
        Engine.start(plan, model)


def test_an_engine_that_fails_leaves_nobody_waiting(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept(self: Flights, handles: Sequence[Handle], now_s: float) -> None:
        assert not handles, "a bug"

    model = models("llama")
    with Engine.start(plans(model), model, nursery=nursery) as engine:
        running = engine.submit(FOREVER)
        next(iter(running))
        monkeypatch.setattr(Flights, "accept", accept)
        for handle in (engine.submit(FOREVER), running):
            with pytest.raises(RuntimeFault, match="the engine failed: AssertionError: a bug"):
                handle.result()
        with pytest.raises(RuntimeFault, match="a bug"):
            engine.submit(FOREVER)
