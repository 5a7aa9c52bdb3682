"""A server in a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from mnemoc.folder import load_artifact, write_artifact

from ..harness import make_model, make_plan

LAYOUT, CONTEXT, OUTPUT = "tp=1,spp=1,kvp=1", 16_000, 8000
START_S = 120
"""How long a server may take to be healthy."""


@dataclass(frozen=True)
class Setup:
    """A model's directory and a plan for it."""

    model: Path
    plan: Path


@dataclass(frozen=True)
class State:
    """What a server holds at one moment. Memory in bytes; pages: the fraction of them that requests hold."""

    server_bytes: int
    workers_bytes: int
    descriptors: int
    pages: float
    running: int
    waiting: int

    @property
    def idle(self) -> bool:
        return not (self.pages or self.running or self.waiting)


@dataclass(frozen=True)
class Served:
    """A running server. process: the one that listens, whose descendants are the workers."""

    port: int
    process: psutil.Process
    model: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cpu_s(self) -> float:
        """What the listening process alone has computed: the engine's thread and the event loop."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def state(self) -> State:
        values = self.metrics()
        children = self.process.children(recursive=True)
        return State(
            self.process.memory_info().rss,
            sum(child.memory_info().rss for child in children),
            self.process.num_fds(),
            values["kv_cache_usage_perc"],
            int(values["num_requests_running"]),
            int(values["num_requests_waiting"]),
        )

    def health(self) -> None:
        """Raises unless it is well."""
        urllib.request.urlopen(f"{self.url}/health", timeout=60).close()

    def metrics(self) -> dict[str, float]:
        """Counters and gauges, by their names after `mnemoc:`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line.startswith("mnemoc:"))
        return {name.partition("{")[0][7:]: float(value) for name, _, value in samples}

    def settled(self, within_s: float = 30) -> State:
        """Its state once no request is left; as it is after `within_s`, if one stays. It has to be well."""
        deadline_s = time.monotonic() + within_s
        while not (state := self.state()).idle and time.monotonic() < deadline_s:
            time.sleep(0.05)
        self.health()
        return state


def small_setup(work: Path, pages: int = 512) -> Setup:
    """The demo's model on one worker, with so few KV pages that all of them are soon in use.

    A worker's memory is the kernel's to give, page by page: where there are many, it grows for hours.
    """
    work.mkdir(exist_ok=True)
    setup = Setup(make_model(work / "model"), work / "plan")
    make_plan(setup.plan, setup.model, "local", LAYOUT, CONTEXT, OUTPUT, tbt="500ms")
    manifest, contents = load_artifact(setup.plan)
    plan = dataclasses.replace(manifest.plan, num_pages=pages)
    write_artifact(setup.plan, dataclasses.replace(manifest, plan=plan), contents)
    return setup


@contextmanager
def server(setup: Setup, command: Sequence[str] = ("mnemoc", "serve")) -> Iterator[Served]:
    """`python -m COMMAND PLAN --weights MODEL --port PORT`, from its first health to its end by SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    module, *words = command
    run = [sys.executable, "-m", module, *words, setup.plan, "--weights", setup.model]
    log = setup.plan.with_name("server.log")
    process = subprocess.Popen([*map(str, run), "--port", str(port), "--log-file", str(log)])
    try:
        served = Served(port, psutil.Process(process.pid), setup.model.name)
        await_health(served.url, process)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def await_health(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode} before it was healthy")
        with contextlib.suppress(OSError):  # it listens long before it answers
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise SystemExit(f"the server was not healthy within {START_S} s")
