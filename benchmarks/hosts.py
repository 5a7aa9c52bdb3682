"""Two hosts in network namespaces: how long until a fault is noticed, and until requests are answered again.

A server made from a plan's own launch files, its workers under torchrun on both hosts; a worker is killed or
stopped (SIGSTOP), or a host's link is cut and healed once that was noticed. Noticed: until /health is 503.
Back: from then on, until a request that was sent at once is answered.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from .harness import Figure, make_model, mnemoc, say, write_report
from .namespaces import Host, hosts

CLUSTER = Path(__file__).parents[1] / "planner" / "clusters" / "local.toml"


PORT = 8000


def make_plan(folder: Path) -> tuple[Path, Path]:
    """A plan of two stages for two nodes of one core each, and its weights."""
    text = CLUSTER.read_text().replace("nodes = { value = 1", "nodes = { value = 2")
    text = text.replace('devices_per_node = { value = "auto"', "devices_per_node = { value = 1")
    (folder / "two.toml").write_text(text)
    model = make_model(folder / "model")
    mnemoc(
        "plan", model, "--cluster", folder / "two.toml", "--layout", "tp=1,spp=2,kvp=1",
        "--context", "2K", "--output-tokens", 64, "--ttft", "60s", "--tbt", "1s", "-o", folder / "plan",
    )  # fmt: skip
    return folder / "plan", model


def start(plan: Path, model: Path, pair: list[Host], log: Path) -> str:
    """The server on the first host, workers on both; where it serves."""
    shared = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HEAD": pair[0].address,
        "WEIGHTS": str(model),
        "MNEMOC_SECRET": "0" * 32,
    }
    script = str(plan / "launch" / "torchrun.sh")
    pair[0].start(["bash", script, "server"], shared, log)
    for number, host in enumerate(pair):
        own = {"NODE_RANK": str(number), "ADDRESS": host.address}
        host.start(["bash", script, "workers"], shared | own, log)
    return f"http://{pair[0].address}:{PORT}"


def until(url: str, status: int, seconds: float = 120) -> float:
    """How long it took until /health said so."""
    begun_s = time.monotonic()
    while time.monotonic() < begun_s + seconds:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == status:
                return time.monotonic() - begun_s
        except httpx.TransportError:
            pass  # it does not serve yet
        time.sleep(0.02)
    raise SystemExit(f"/health was not {status} within {seconds:.0f} s")


def answered(url: str) -> float:
    """How long a request of a few tokens takes."""
    begun_s = time.monotonic()
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
    return time.monotonic() - begun_s


SIGNALS = {"worker killed": signal.SIGKILL, "worker stopped": signal.SIGSTOP}


def signal_worker(host: Host, number: signal.Signals) -> None:
    """To the one that runs there."""
    for pid in host.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = psutil.Process(pid).cmdline()
            if words[-2:] == ["-m", "mnemoc.runtime.rank.worker"] and "--nnodes" not in words:
                os.kill(pid, number)
                return
    raise SystemExit("no worker runs there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, hosts(2) as pair:
        folder = Path(scratch)
        plan, model = make_plan(folder)
        url = start(plan, model, pair, folder / "log")
        until(url, 200)
        taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in (*SIGNALS, "link cut")}
        for number in range(asked.repeats):
            for kind, times in taken.items():
                host = pair[number % 2] if kind in SIGNALS else pair[1]
                if kind in SIGNALS:
                    signal_worker(host, SIGNALS[kind])
                else:
                    host.cut()
                noticed_s = until(url, 503)
                host.heal()
                times.append((noticed_s, answered(url)))
                say(f"{kind}: noticed after {noticed_s:.2f} s, back {times[-1][1]:.2f} s later")
                time.sleep(3)
    figures = [
        Figure(
            f"{kind}: {what}",
            statistics.median(seconds := [both[at] for both in times]),
            "s",
            "seconds",
            f"median of {len(seconds)}, worst {max(seconds):.3g} s",
        )
        for kind, times in taken.items()
        for at, what in enumerate(("until noticed", "then until a request is answered"))
    ]
    write_report("hosts", "Two hosts, in network namespaces", figures, taken)


if __name__ == "__main__":
    main()
