"""What goes wrong, and what is left behind: nothing, but a sentence."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from mnemoc import artifact
from mnemoc.errors import BadInput, MnemocError, RuntimeFault
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.workers import NurseryProcess

MakeModel = Callable[..., Path]
MakePlan = Callable[..., Path]
FOREVER = Request((1, 2, 3), 900, Sampling(ignore_eos=True))


def workers_of(nursery: NurseryProcess) -> list[psutil.Process]:
    return psutil.Process(nursery.process.pid).children()


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_worker_fails_what_runs_and_the_engine_serves_again(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess, victim: int
) -> None:
    model = models("llama")
    plan = plans(model, spp=2, kvp=2, context=1000, stripe_tokens=500)
    short = Request((5, 6, 7), 8)
    with Engine.start(plan, model, nursery=nursery) as engine:
        before = engine.submit(short).result().tokens
        running = engine.submit(FOREVER)
        next(iter(running))
        killed_s = time.monotonic()
        os.kill(workers_of(nursery)[victim].pid, signal.SIGKILL)
        with pytest.raises(RuntimeFault, match=rf"worker {victim} died \(killed by SIGKILL\)"):
            running.result()
        assert time.monotonic() - killed_s < 2
        assert not engine.healthy
        queued = engine.submit(short)
        assert queued.result().tokens == before
        assert engine.healthy
        assert engine.kv_used_fraction == 0
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
        with pytest.raises(RuntimeFault):
            running.result()
        assert len(waiting.result().tokens) == 10


def test_the_death_of_the_workers_parent_is_survived_too(
    models: MakeModel, plans: MakePlan
) -> None:
    model = models("llama")
    private = NurseryProcess()
    try:
        with Engine.start(plans(model, spp=2), model, nursery=private) as engine:
            orphans = workers_of(private)
            running = engine.submit(FOREVER)
            next(iter(running))
            private.process.kill()
            with pytest.raises(RuntimeFault, match="parent process"):
                running.result()
            psutil.wait_procs(orphans, timeout=2)
            assert not any(process.is_running() for process in orphans)
            assert len(engine.submit(Request((1,), 4)).result().tokens) == 4
    finally:
        private.close()


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


def test_a_fault_in_generated_code_is_told_with_the_line_that_failed(
    models: MakeModel, plans: MakePlan, nursery: NurseryProcess
) -> None:
    model = models("llama")
    directory = plans(model)
    manifest, files = artifact.load(directory)
    source = files["schedule/stage_0.py"].decode()
    bomb = "    1 / (batch.pos.shape[0] - 3)  # !"
    broken = source.replace('comm):\n    """One', f'comm):\n{bomb}\n    """One')
    assert broken != source
    artifact.write(directory, manifest, {**files, "schedule/stage_0.py": broken.encode()})
    with Engine.start(directory, model, nursery=nursery) as engine:
        with pytest.raises(RuntimeFault, match="ZeroDivisionError") as caught:
            engine.submit(FOREVER).result()
        assert bomb in "".join(caught.value.__notes__)
        errors: list[MnemocError] = []
        while not errors:
            try:
                engine.submit(FOREVER).result()
            except MnemocError as error:
                errors += [error] if "restart" in str(error) else []
        assert "gave up after 3 restarts" in str(errors[0])
        assert not engine.healthy


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


def running_requests(client: httpx.Client) -> str:
    """The line of /metrics that counts them."""
    lines = client.get("/metrics").text.splitlines()
    return next(line for line in lines if line.startswith("mnemoc:num_requests_running{"))


SERVE = """
import sys
from pathlib import Path
from mnemoc.runtime.server import serve
say = lambda text: print(text, file=sys.stderr, flush=True)
serve(Path(sys.argv[1]), Path(sys.argv[2]), "127.0.0.1", 0, progress=say)
"""


def start_server(plan: Path, model: Path) -> tuple[subprocess.Popen[str], str]:
    """A server process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(plan), str(model)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving on (\S+)/v1", line):
            return process, found[1]
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_server_ends_no_process_outlives_it(
    models: MakeModel, plans: MakePlan, how: signal.Signals
) -> None:
    model = models("llama")
    process, _ = start_server(plans(model, spp=2), model)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3  # the workers' parent and two workers
    process.send_signal(how)
    process.wait(10)
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert (len(gone), alive) == (3, [])
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read() or how == signal.SIGINT
    process.stderr.close()


def test_a_server_whose_worker_dies_says_so_and_recovers(
    models: MakeModel, plans: MakePlan
) -> None:
    model = models("llama")
    process, url = start_server(plans(model, kvp=2, num_pages=100), model)
    family = psutil.Process(process.pid).children(recursive=True)
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"prompt": [1, 2], "max_tokens": 1000, "ignore_eos": True}
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))

    asking = threading.Thread(target=ask)
    try:
        with httpx.Client(base_url=url) as client:
            asking.start()
            assert until(lambda: " 1.0" in running_requests(client))
            family[-1].kill()
            assert until(lambda: client.get("/health").status_code == 503)
            asking.join()
            assert answers[0].status_code == 503
            assert "died (killed by SIGKILL)" in answers[0].json()["error"]["message"]
            assert until(lambda: client.get("/health").status_code == 200)
            again = client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 4})
            assert again.status_code == 200
    finally:
        process.terminate()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()
    assert not psutil.wait_procs(family, timeout=5)[1]
