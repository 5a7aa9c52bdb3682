"""Measures this machine with the kernels that plans emit.

`measure` starts processes of one thread each (`probes`): first one alone, for a core by itself may draw most
of what memory has; then one per core, all at once, as the workers of a plan share the machine.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import RuntimeFault
from ..executor.workers import worker_environment
from .others import Watch
from .probes import Points

_TIMEOUT_S = 300

Progress = Callable[[float], None]
Rates = Mapping[str, Points]


@dataclass(frozen=True)
class Figures:
    """What was measured, in base units; points are [size, rate].

    peak_flops            of one process among all: the best of everything that computes
    bandwidth             of one process alone: the best of everything that streams
    shared_bandwidth      of all processes together, in the kernels that stream
    matmul                FLOP/s of a layer's products, by rows
    attention_prefill     FLOP/s of chunks after a past, by rows that share a KV head's keys
    attention_decode      B/s of one decode, by bytes of K and V
    memory                B/s of products of one row, by bytes of their weights
    layer_s               a whole layer for one row, after `probes.LAYER_TOKENS` tokens
    layers_s              whole layers, by rows of a prompt's beginning
    link                  B/s of messages between processes, by bytes
    host                  B/s of K and V pages copied to another buffer, by bytes
    others                cores that other programs kept busy meanwhile
    """

    peak_flops: float
    bandwidth: float
    shared_bandwidth: float
    matmul: Points
    attention_prefill: Points
    attention_decode: Points
    memory: Points
    layer_s: float
    layers_s: Points
    link: Points
    host: Points
    others: float


def measure(
    directory: Path, workers: int, quick: bool, progress: Progress = lambda fraction: None
) -> Figures:
    """Everything above, with the kernels of the plan in `directory`, up to `workers` at once.

    progress: the share that is done
    """
    watch = Watch()
    command = [sys.executable, "-m", "mnemoc.runtime.measuring.probes", str(directory)]
    command.append("quick" if quick else "full")
    (alone,) = _crew([*command, "alone"], 1, lambda share: progress(share / 2))
    each = _crew([*command, "together"], workers, lambda share: progress((1 + share) / 2))
    together = {what: _mean(rates[what] for rates in each) for what in each[0]}
    streams = *alone["attention_decode"], *alone["memory"]
    shared = *together["attention_decode"], *together["memory"]
    return Figures(
        peak_flops=_best(*together["product"], *together["matmul"], *together["attention_prefill"]),
        bandwidth=_best(*alone["stream"], *streams),
        shared_bandwidth=workers * _best(*shared),
        matmul=together["matmul"],
        attention_prefill=together["attention_prefill"],
        attention_decode=alone["attention_decode"],
        memory=alone["memory"],
        layer_s=1 / _best(*alone["layer"]),
        layers_s=[(rows, 1 / rate) for rows, rate in together["layers"]],
        link=together["link"],
        host=together["host"],
        others=watch.others(),
    )


def _mean(measured: Iterable[Points]) -> Points:
    """Rates averaged over processes."""
    return [
        (points[0][0], statistics.fmean(rate for _, rate in points))
        for points in zip(*measured, strict=True)
    ]


def _best(*points: tuple[float, float]) -> float:
    return max(rate for _, rate in points)


def _crew(command: Sequence[str], size: int, progress: Progress) -> list[Rates]:
    """What each of `size` processes measured, all at once."""
    port = _free_port()
    processes = []
    for rank in range(size):
        env = worker_environment() | {"RANK": str(rank), "WORLD_SIZE": str(size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe))

    def stop() -> None:
        for process in processes:
            process.kill()

    late = threading.Timer(_TIMEOUT_S, stop)
    late.start()
    try:
        assert processes[0].stdout is not None
        first = ""
        for line in processes[0].stdout:  # shares that are done, then the rates as a JSON object
            first = line
            if not line.startswith("{"):
                progress(float(line))
        outputs = [process.communicate() for process in processes]
    finally:
        late.cancel()
        stop()
    for process, (_, complaint) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = complaint.strip().splitlines()[-1:]
            raise RuntimeFault("measuring this machine failed", got=" ".join(last))
    lines = [first, *(output.splitlines()[-1] for output, _ in outputs[1:])]
    return [json.loads(line) for line in lines]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
