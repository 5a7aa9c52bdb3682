"""Many clients at once, and those who leave: nothing of them stays. `benchmarks/serving` has thousands."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psutil
import pytest
from mnemoc.runtime.server import Limits, Options

CLIENT = Path(__file__).parents[3] / "benchmarks" / "serving" / "client.py"
DESCRIPTORS = 64
SERVE = """
import resource, sys
from pathlib import Path
from mnemoc.runtime.server import serve
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]), 4096))
say = lambda text: print(text, file=sys.stderr, flush=True)
serve(Path(sys.argv[1]), Path(sys.argv[2]), "127.0.0.1", 0, progress=say)
"""
LONG = {"prompt": [5] * 400, "max_tokens": 600, "ignore_eos": True, "stream": True}


@dataclass(frozen=True)
class Served:
    """A server in a process of its own, that began with few descriptors."""

    port: int
    process: psutil.Process

    def metric(self, name: str) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        found = re.search(rf"^mnemoc:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    @property
    def requests(self) -> float:
        return self.metric("num_requests_running") + self.metric("num_requests_waiting")

    def is_idle(self) -> bool:
        return not (self.requests or self.metric("kv_cache_usage_perc"))


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module")
def client() -> ModuleType:
    """benchmarks/serving/client.py, which no wheel has."""
    spec = importlib.util.spec_from_file_location("serving_client", CLIENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(models: Callable[..., Path], plans: Callable[..., Path]) -> Iterator[Served]:
    model = models("llama")
    plan = plans(model, num_pages=128, context=1500)
    words = [sys.executable, "-c", SERVE, str(plan), str(model), str(DESCRIPTORS)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = (re.search(r"serving on http://.*:(\d+)/v1", line) for line in process.stderr)
        yield Served(next(int(found[1]) for found in said if found), psutil.Process(process.pid))
        process.terminate()
        assert process.stderr.read() == "", "nothing to complain of"
        assert process.wait(10) == 0


def ask(served: Served, client: ModuleType, **body: Any) -> Any:
    return client.ask(served.port, client.post({"ignore_eos": True, **body}))


def test_more_streams_stand_open_than_descriptors_were_given_at_first(
    served: Served, client: ModuleType
) -> None:
    before = served.process.num_fds()
    with contextlib.ExitStack() as open_:
        for _ in range(2 * DESCRIPTORS):
            connection = open_.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            connection.sendall(client.post(LONG))
        assert until(lambda: served.process.num_fds() > 2 * DESCRIPTORS)
        assert not served.is_idle()
        assert httpx.get(f"http://127.0.0.1:{served.port}/health").status_code == 200
    assert until(served.is_idle)
    assert until(lambda: served.process.num_fds() <= before)


def test_clients_that_leave_at_any_moment_leave_nothing(served: Served, client: ModuleType) -> None:
    choose, before = random.Random(3), served.process.num_fds()

    async def leave() -> None:
        request = client.post({**LONG, "stream": choose.random() < 0.5})
        if choose.random() < 0.3:
            request = request[: choose.randrange(1, len(request))]
        after_s, reset = choose.random() * 0.5, choose.random() < 0.5
        await client.leave(served.port, request, after_s=after_s, reset=reset)

    async def all_of_them() -> None:
        await asyncio.gather(*(leave() for _ in range(50)))

    asyncio.run(all_of_them())
    assert until(served.is_idle)
    assert until(lambda: served.process.num_fds() <= before)


def test_requests_leave_no_memory_behind(served: Served, client: ModuleType) -> None:
    async def some(count: int) -> None:
        replies = await asyncio.gather(
            *(
                ask(served, client, prompt=[i, 7, 8], max_tokens=4, stream=i % 2 == 0)
                for i in range(count)
            )
        )
        assert {reply.status for reply in replies} == {200}

    sizes = []
    for _ in range(4):
        asyncio.run(some(30))
        assert until(served.is_idle)
        sizes.append(served.process.memory_info().rss)
    assert sizes[-1] - sizes[1] < 4 * 2**20, "warm after two rounds"


def test_a_client_that_does_not_read_holds_nobody_up_and_misses_nothing(
    served: Served, client: ModuleType
) -> None:
    """With all that is told of each token, an answer has more than fits between server and client."""
    body = {"prompt": [9] * 20, "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
    long = {"logprobs": 20, "stream_options": {"continuous_usage_stats": True}}
    whole = asyncio.run(ask(served, client, **body)).json["choices"][0]["text"]
    asked = client.post({**body, **long, "stream": True})
    with client.stalled(served.port, asked) as slow:
        quick = asyncio.run(ask(served, client, prompt=[1, 2], max_tokens=3))
        assert quick.json["usage"]["completion_tokens"] == 3
        assert until(served.is_idle), "the engine does not wait for readers"
        received = b""
        while b"[DONE]" not in received:
            received += slow.recv(1 << 16)
    found = [
        json.loads(event) for event in re.findall(rb"^data: (\{.*\})$", received, re.MULTILINE)
    ]
    assert "".join(event["choices"][0]["text"] for event in found) == whole
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts[-1] == 1000
    assert max(b - a for a, b in itertools.pairwise(counts)) > 100, "what nobody read came at once"


def test_a_client_that_reads_nothing_loses_its_place(
    front: Callable[..., AbstractContextManager[str]], client: ModuleType
) -> None:
    body = {"prompt": [9] * 20, "max_tokens": 1400, "ignore_eos": True, "logprobs": 20}
    with front(Options(limits=Limits(concurrency=1, send_s=1.0))) as url:
        port = int(url.rpartition(":")[2])
        with client.stalled(port, client.post({**body, "stream": True})) as slow:
            at_work = lambda: httpx.get(f"{url}/load").json()["server_load"]  # noqa: E731
            assert until(lambda: at_work() == 1)
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": [1], "max_tokens": 1})
            assert refused.status_code == 429, "it has the only place"
            assert until(lambda: at_work() == 0), "and had it, for it read nothing"
            slow.settimeout(30)
            with pytest.raises(ConnectionResetError):
                _ = [*iter(lambda: slow.recv(1 << 16), b"")]
