"""Workers from outside: who is let in, what makes a set of them, and what ends it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import zmq
from mnemoc.errors import BadInput, RuntimeFault, UsageError
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor import outside, vigil
from mnemoc.runtime.executor.workers import Down, Workers
from mnemoc.runtime.protocol import control
from mnemoc.runtime.protocol.messages import Failed, Hello, Refused, Welcome
from mnemoc.runtime.protocol.wire import decode_answer, encode_hello, encode_reply
from mnemoc.runtime.rank import leash
from mnemoc.runtime.rank.settings import Settings

SECRET = "a secret of thirty-two characters, at least"
MakeModel = Callable[..., Path]
MakePlan = Callable[..., Path]


JOINS = """
import os, time
from mnemoc.runtime.rank import leash
from mnemoc.runtime.rank.settings import Settings

print(leash.join(Settings.read(os.environ)).token, flush=True)
time.sleep(60)
"""


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def worker_of(plan: Path, weights: Path, address: str) -> dict[str, str]:
    """The environment of its workers."""
    return os.environ | {
        "MNEMOC_ARTIFACT": str(plan),
        "MNEMOC_WEIGHTS": str(weights),
        "MNEMOC_CONTROL": address,
        "MNEMOC_SECRET": SECRET,
        "OMP_NUM_THREADS": "1",
    }


def start_joining(
    plan: Path, weights: Path, address: str, rank: int, world: int
) -> subprocess.Popen[bytes]:
    """A worker that joins, says its set's token and does nothing else."""
    env = worker_of(plan, weights, address) | {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen([sys.executable, "-c", JOINS], env=env, stdout=subprocess.PIPE)


@contextmanager
def waiting(plan: Path, weights: Path, world: int) -> Iterator[tuple[Workers, str]]:
    """The engine's side, and the address where it waits."""
    address = free_address()
    workers = Workers(plan, weights, world, outside.at(address, plan, {"MNEMOC_SECRET": SECRET}))
    try:
        workers.spawn()
        yield workers, address
    finally:
        workers.close()


@contextmanager
def knocking(address: str, hello: Hello, secret: str = SECRET) -> Iterator[zmq.Socket[bytes]]:
    """A worker that says who it is, once."""
    with zmq.Context() as context:
        name = f"leash-{os.urandom(4).hex()}"
        with control.dial(context, address, name, secret.encode()) as line:
            line.linger = 0
            line.send_multipart(encode_hello(hello))
            yield line


def heard(
    workers: Workers, line: zmq.Socket[bytes], seconds: float = 20
) -> Welcome | Refused | None:
    """What the engine answers."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        workers.poll(0.05)
        if line.poll(0):
            return decode_answer(line.recv_multipart())
    return None


def insist(line: zmq.Socket[bytes], hello: Hello, seconds: float = 10) -> Welcome:
    """Say it until it is heard: the engine may just be beginning anew."""
    deadline_s = time.monotonic() + seconds
    while not line.poll(200) and time.monotonic() < deadline_s:
        line.send_multipart(encode_hello(hello))
    answer = decode_answer(line.recv_multipart(zmq.NOBLOCK))
    assert isinstance(answer, Welcome)
    return answer


def down(workers: Workers, seconds: float = 20) -> str:
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        for event in workers.poll(0.05):
            if isinstance(event, Down):
                return str(event.error)
    pytest.fail("the workers are still thought to run")


@pytest.fixture
def plan(models: MakeModel, plans: MakePlan) -> Path:
    return plans(models("llama"), spp=2)


def test_a_set_is_complete_when_every_rank_is_there_and_over_when_one_is_gone(
    models: MakeModel, plan: Path
) -> None:
    digest = control.digest_of(plan)
    with (
        waiting(plan, models("llama"), 2) as (workers, address),
        knocking(address, Hello(0, 2, digest, "a")) as first,
    ):
        assert heard(workers, first, 0.5) is None
        with knocking(address, Hello(1, 2, digest, "b")) as second:
            welcomed = heard(workers, first), heard(workers, second)
            assert isinstance(welcomed[0], Welcome) and welcomed[0] == welcomed[1]
        assert down(workers) == "worker 1 on b is gone: no connection"


def test_a_rank_that_comes_again_ends_the_set_that_it_was_in(models: MakeModel, plan: Path) -> None:
    digest = control.digest_of(plan)
    with (
        waiting(plan, models("llama"), 1) as (workers, address),
        knocking(address, Hello(0, 1, digest, "a")) as first,
    ):
        assert isinstance(heard(workers, first), Welcome)
        with knocking(address, Hello(0, 1, digest, "b")):
            assert down(workers) == "worker 0 was started again, on b"


def test_another_plan_and_another_number_of_workers_are_refused(
    models: MakeModel, plan: Path
) -> None:
    digest = control.digest_of(plan)
    for hello, why in (
        (
            Hello(0, 2, "0" * 64, "b"),
            "worker 0 on b has another plan (its manifest.json has sha256 0000",
        ),
        (Hello(0, 3, digest, "b"), "worker 0 on b is one of 3 workers, the plan is for 2"),
        (Hello(2, 2, digest, "b"), "worker 2 on b is one of 2 workers, the plan is for 2"),
    ):
        with (
            waiting(plan, models("llama"), 2) as (workers, address),
            knocking(address, hello) as line,
        ):
            assert down(workers).startswith(why)
            answer = heard(workers, line)
            assert isinstance(answer, Refused) and answer.sentence.startswith(why)


def test_whoever_lacks_the_secret_is_not_heard_at_all(models: MakeModel, plan: Path) -> None:
    hello = Hello(0, 1, control.digest_of(plan), "b")
    with waiting(plan, models("llama"), 1) as (workers, address):
        with knocking(address, hello, "b" * 43) as wrong:
            assert heard(workers, wrong, 1) is None
        with zmq.Context() as context, context.socket(zmq.DEALER) as bare:
            bare.linger = 0
            bare.connect(address)
            bare.send_multipart(encode_hello(hello))
            assert heard(workers, bare, 1) is None
        with knocking(address, hello) as right:
            assert isinstance(heard(workers, right), Welcome)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "neither MNEMOC_SECRET nor MNEMOC_SECRET_FILE is set"),
        ({"MNEMOC_SECRET": "short"}, "less than 32 characters"),
        ({"MNEMOC_SECRET_FILE": "/nowhere"}, "/nowhere: cannot read the secret"),
    ],
)
def test_no_secret_is_a_sentence(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        control.read_secret(environment)


def test_a_secret_may_lie_in_a_file_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    secret = control.read_secret({"MNEMOC_SECRET_FILE": str(tmp_path / "secret")})
    assert secret == SECRET.encode()
    settings = Settings(0, 0, 1, "", None, tmp_path, tmp_path, 1, secret=secret)
    launcher = outside.Outside("tcp://0.0.0.0:1", "d", secret)
    assert SECRET not in repr(settings) + repr(launcher)


@pytest.mark.parametrize("address", ["0.0.0.0:29600", "tcp://0.0.0.0", "ipc://x"])
def test_an_address_that_is_none_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match="write tcp://HOST:PORT"):
        outside.Outside(address, "d", b"s")


def test_on_several_hosts_loopback_is_refused_and_a_choice_kept() -> None:
    several = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(RuntimeFault, match=r"towards 127\.0\.0\.1 this host is 127\.0\.0\.1"):
        leash.choose_interface(several)
    chosen = several | {"GLOO_SOCKET_IFNAME": "lo"}
    leash.choose_interface(chosen)
    assert chosen == several | {"GLOO_SOCKET_IFNAME": "lo"}
    alone = several | {"LOCAL_WORLD_SIZE": "2"}
    leash.choose_interface(alone)
    assert "GLOO_SOCKET_IFNAME" not in alone


def test_a_first_start_waits_for_the_workers_again_until_one_says_that_it_is_of_no_use(
    models: MakeModel, plans: MakePlan
) -> None:
    model = models("llama")
    plan, address = plans(model), free_address()
    hello, said = Hello(0, 1, control.digest_of(plan), "a"), list[str]()
    launcher = outside.at(address, plan, {"MNEMOC_SECRET": SECRET})
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(Engine.start, plan, model, progress=said.append, nursery=launcher)
        with knocking(address, hello) as line:
            first = insist(line, hello)
        while not any("worker 0 on a is gone" in it for it in said):
            assert not starting.done(), starting.result()
            time.sleep(0.01)
        with knocking(address, hello) as line:
            second = insist(line, hello)
            assert second.token != first.token
            with zmq.Context() as context:
                name = f"{second.token}-0"
                with control.dial(context, address, name, SECRET.encode()) as worker:
                    failed = Failed(0, "no such directory of weights", BadInput.exit_code)
                    worker.send_multipart(encode_reply(failed))
                    with pytest.raises(BadInput, match="no such directory of weights"):
                        starting.result(10)


def test_whoever_loses_its_engine_leaves_also_if_it_is_stopped_or_its_leash_is_held_no_more(
    models: MakeModel, plan: Path
) -> None:
    stopped, free, slipped = range(3)
    model = models("llama")
    with waiting(plan, model, 3) as (workers, address):
        started = [start_joining(plan, model, address, rank, 3) for rank in range(3)]
        try:
            while not all(select.select([it.stdout], [], [], 0)[0] for it in started):
                workers.poll(0.05)
            guards = [psutil.Process(it.pid).children()[0] for it in started]
            guards[slipped].kill()
            assert started[slipped].wait(5) == RuntimeFault.exit_code
            started[stopped].send_signal(signal.SIGSTOP)
            workers.spawn()
            assert started[free].wait(5) == RuntimeFault.exit_code
            assert started[stopped].wait(5) == -signal.SIGKILL
            assert not psutil.wait_procs(guards, 5)[1]
        finally:
            for process in started:
                process.kill()
                process.communicate()


@pytest.mark.slow
def test_torchrun_starts_stopped_workers_again_and_the_stream_goes_on(
    models: MakeModel, plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vigil, "SILENCE_S", 2.5)
    model, address = models("llama"), free_address()
    env = worker_of(plan, model, address)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", free_address().removeprefix("tcp://"),
        "--max-restarts", "9", "-m", "mnemoc.runtime.rank.worker",
    ]  # fmt: skip
    request = Request((5, 6, 7), 400, Sampling(ignore_eos=True))
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        launcher = outside.at(address, plan, env)
        with Engine.start(plan, model, nursery=launcher) as engine:
            undisturbed = engine.submit(request).result().tokens
            running = engine.submit(request)
            next(iter(running))
            victim, other = psutil.Process(agent.pid).children()
            victim.send_signal(signal.SIGSTOP)
            assert running.result().tokens == undisturbed
            assert not victim.is_running() and not other.is_running()
            assert engine.stats.restarts == 1
            left = psutil.Process(agent.pid).children(recursive=True)
        gone, _ = psutil.wait_procs(left, 10)
        assert set(gone) == set(left), "workers outlive their engine"
    finally:
        agent.terminate()
        agent.wait(30)
