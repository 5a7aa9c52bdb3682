"""Two hosts: namespaces with their own addresses, torchrun between them, a link cut and healed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from mnemoc import pipeline, planner
from mnemoc.artifact import Workload
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.netns]

ROOT = Path(__file__).parents[3]
SECRET = "a secret of thirty-two characters, at least"
ASKED = {"long": ((1, 2, 3), 1500), "short": ((9, 8, 7, 6), 24)}
"""Prompts, and how many tokens are to follow."""
MakeModel = Callable[..., Path]


def namespaces() -> ModuleType:
    """benchmarks/namespaces.py, which no wheel has."""
    path = ROOT / "benchmarks" / "namespaces.py"
    spec = importlib.util.spec_from_file_location("namespaces", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["namespaces"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plan(models: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages for two nodes of one core each, and the files that start it there."""
    folder = tmp_path_factory.mktemp("hosts")
    text = (Path(planner.__file__).parent / "clusters" / "local.toml").read_text()
    text = text.replace(
        'nodes = { value = 1, unit = "nodes"', 'nodes = { value = 2, unit = "nodes"'
    )
    text = text.replace('devices_per_node = { value = "auto"', "devices_per_node = { value = 1")
    (folder / "two.toml").write_text(text)
    workload = Workload(2048, 60.0, 1.0, output_tokens=1024)
    pinned = {"tp": 1, "spp": 2, "kvp": 1}
    made = pipeline.plan(str(models("llama")), str(folder / "two.toml"), workload, pinned=pinned)
    pipeline.emit(made, folder / "plan")
    return folder / "plan"


@pytest.fixture(scope="module")
def on_one_host(models: MakeModel, plan: Path, nursery: NurseryProcess) -> dict[str, str]:
    """What the same plan says with both workers on this host, by the prompt's kind."""
    model = models("llama")
    tokenizer = Tokenizer(model)
    said = {}
    with Engine.start(plan, model, nursery=nursery) as engine:
        for kind, (prompt, max_tokens) in ASKED.items():
            request = Request(prompt, max_tokens, Sampling(ignore_eos=True))
            said[kind] = tokenizer.decode(engine.submit(request).result().tokens)
    return said


@dataclass
class Pair:
    """A server on the first of two hosts, workers on both."""

    hosts: list[Any]
    url: str
    log: Path

    def health(self) -> int:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code
        except httpx.TransportError:
            return 0

    def until(self, status: int, seconds: float) -> float:
        """How long it took until /health said so."""
        begun_s = time.monotonic()
        while self.health() != status:
            assert time.monotonic() < begun_s + seconds, self.log.read_text()[-4000:]
            time.sleep(0.05)
        return time.monotonic() - begun_s

    def stream(self, kind: str) -> Iterator[str]:
        """The greedy answer, piece by piece."""
        prompt, max_tokens = ASKED[kind]
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=90) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    yield from (choice["text"] for choice in event["choices"])


@pytest.fixture(scope="module")
def pair(models: MakeModel, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    module = namespaces()
    if not module.possible():
        pytest.skip("network namespaces cannot be made here")
    log = tmp_path_factory.mktemp("pair") / "log"
    with module.hosts(2) as hosts:
        shared = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HEAD": hosts[0].address,
            "WEIGHTS": str(models("llama")),
            "MNEMOC_SECRET": SECRET,
        }
        script = str(plan / "launch" / "torchrun.sh")
        hosts[0].start(["bash", script, "server"], shared, log)
        for number, host in enumerate(hosts):
            own = {"NODE_RANK": str(number), "ADDRESS": host.address}
            host.start(["bash", script, "workers"], shared | own, log)
        found = Pair(hosts, f"http://{hosts[0].address}:8000", log)
        found.until(200, 60)
        yield found


def test_tokens_are_those_of_one_host(pair: Pair, on_one_host: dict[str, str]) -> None:
    assert "".join(pair.stream("short")) == on_one_host["short"]
    ranks = [[_rank(pid) for pid in host.processes()] for host in pair.hosts]
    assert [{rank for rank in found if rank} for found in ranks] == [{"0"}, {"1"}]


def test_a_cut_link_is_noticed_within_seconds_and_healed_nothing_is_lost(
    pair: Pair, on_one_host: dict[str, str]
) -> None:
    pieces: list[str] = []
    reading = threading.Thread(target=lambda: pieces.extend(pair.stream("long")))
    reading.start()
    while len(pieces) < 50:
        assert reading.is_alive()
        time.sleep(0.01)
    pair.hosts[1].cut()
    assert pair.until(503, 15) < 10
    assert reading.is_alive()
    pair.hosts[1].heal()
    pair.until(200, 60)
    reading.join(60)
    assert "".join(pieces) == on_one_host["long"]


def _rank(pid: int) -> str | None:
    """Of a worker; None for any other process."""
    try:
        variables = dict(
            line.split("=", 1)
            for line in Path(f"/proc/{pid}/environ").read_text().split("\0")
            if "=" in line
        )
    except OSError:
        return None
    return variables.get("RANK")
