"""How a server ends, and what it does while its workers die: a process of its own, asked over HTTP."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

MakeModel = Callable[..., Path]
MakePlan = Callable[..., Path]


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


SERVE = """
import sys
from pathlib import Path
from mnemoc.runtime.server import Options, serve
say = lambda text: print(text, file=sys.stderr, flush=True)
options = Options(drain_s=float(sys.argv[3]))
serve(Path(sys.argv[1]), Path(sys.argv[2]), "127.0.0.1", 0, options, progress=say)
"""


@contextmanager
def server(plan: Path, model: Path, drain_s: float = 10) -> Iterator[tuple[Any, str]]:
    """A server process of its own, and its address; nothing is left of it in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(plan), str(model), str(drain_s)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process:
        said = (re.search(r"serving on (\S+)/v1", line) for line in process.stderr)
        url = next(found[1] for found in said if found)
        family = psutil.Process(process.pid).children(recursive=True)
        try:
            yield process, url
            process.wait(10)
        finally:
            process.kill()
            _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_server_ends_no_process_outlives_it(
    models: MakeModel, plans: MakePlan, how: signal.Signals
) -> None:
    model = models("llama")
    with server(plans(model, spp=2), model, drain_s=90) as (process, _):
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3  # the workers' parent and two workers
        process.send_signal(how)
        assert process.wait(20) == (-9 if how == signal.SIGKILL else 0)


def test_a_server_whose_workers_die_says_so_and_loses_nothing(
    models: MakeModel, plans: MakePlan
) -> None:
    model = models("llama")
    body = {"prompt": [1, 2], "max_tokens": 600, "ignore_eos": True, "temperature": 0}
    with (
        server(plans(model, kvp=2, num_pages=100), model) as (process, url),
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        family = psutil.Process(process.pid).children(recursive=True)
        before = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            heard = [next(lines) for _ in range(9)]
            family[
                0
            ].kill()  # the workers' parent: a fresh one takes long enough to be seen missing
            assert until(lambda: httpx.get(f"{url}/health").status_code == 503, 5)
            heard += lines
        assert until(lambda: client.get("/health").status_code == 200)
        assert text_of(heard) == before
        assert heard[-2] == "data: [DONE]"
        process.terminate()


def text_of(lines: Sequence[str]) -> str:
    """A stream's text."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events)


ENDLESS = {"prompt": [1, 2], "max_tokens": 900, "ignore_eos": True, "stream": True}


def test_a_server_told_to_stop_ends_what_runs_and_sends_others_away(
    models: MakeModel, plans: MakePlan
) -> None:
    model = models("llama")
    with (
        server(plans(model), model, drain_s=90) as (process, url),
        httpx.Client(base_url=url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=ENDLESS) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        process.terminate()
        assert until(lambda: httpx.get(f"{url}/health").status_code == 503, 5)
        refused = httpx.post(f"{url}/v1/completions", json=ENDLESS)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["message"] == "the server is shutting down"
        heard = list(lines)
        last = json.loads(heard[-4].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert heard[-2] == "data: [DONE]"
        assert process.wait(20) == 0


@pytest.mark.parametrize(("drain_s", "signals"), [(0.3, 1), (30, 2)])
def test_streams_that_are_cut_short_say_so(
    models: MakeModel, plans: MakePlan, drain_s: float, signals: int
) -> None:
    model = models("llama")
    with (
        server(plans(model, tp=2), model, drain_s) as (process, url),
        httpx.Client(base_url=url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=ENDLESS) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        told_s = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        heard = list(lines)
        assert "told to stop before this answer was complete" in heard[-2]
        assert process.wait(20) == 0
        assert time.monotonic() - told_s < 15
