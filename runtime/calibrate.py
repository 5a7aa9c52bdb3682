"""Measures this machine with the kernels that plans emit: `python -m mnemoc.runtime.calibrate DIR`.

`measure` starts one process per core, each with one thread, and lets all of them measure at once:
that is how the workers of a plan share caches and memory bandwidth. DIR is the artifact of a plan
for one rank. Figures are medians over repeats, then means over the processes.

    peak        FLOP/s of a large matrix product, or of the best of the kernels below
    bandwidth   B/s of a reduction over memory that no cache holds, or of the best below
    matmul, attention_prefill               share of the peak that the model's own shapes reach
    attention_decode, memory                share of the bandwidth; memory by weights times one row
    launch_s    time of an op of one row in a layer, beyond what the layer's weights explain
    latency_s, link                         a small message, and B/s of a large one, between processes
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from .. import artifact
from ..artifact import Batch, Segments
from ..errors import RuntimeFault
from .loader import ArtifactModules
from .workers import worker_environment

CHUNK, CONTEXT, DECODE_CONTEXT = 256, 8192, 32768
COLD_BYTES = 96 << 20  # of weights swept in turn, so that no cache keeps them
OPS = 10  # of a fused layer: two norms, four products, rope, attention, activation, sum
_MESSAGE_BYTES = 1 << 20


def measure(directory: Path, workers: int) -> dict[str, float]:
    """Every figure above, from `workers` processes that measure side by side."""
    command = [sys.executable, "-m", "mnemoc.runtime.calibrate", str(directory)]
    port = _free_port()
    processes = []
    for rank in range(workers):
        env = worker_environment() | {"RANK": str(rank), "WORLD_SIZE": str(workers)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, complaint) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = complaint.decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeFault("measuring this machine failed", got=" ".join(last))
    figures = [json.loads(output) for output, _ in outputs]
    return {key: statistics.fmean(f[key] for f in figures) for key in figures[0]}


def main(argv: Sequence[str]) -> None:
    """One of the processes: prints its figures as one line of JSON."""
    torch.set_num_threads(1)
    manifest, contents = artifact.load(Path(argv[0]))
    modules = ArtifactModules(Path(argv[0]), contents, ("kernels/", "schedule/"))
    dist.init_process_group("gloo")
    with torch.inference_mode():
        bench = _Bench(modules.load(f"schedule.{manifest.plan.stages[0].role}"))
        figures = {**bench.figures(), **_link_figures()}
    dist.destroy_process_group()
    print(json.dumps(figures))


class _Bench:
    """The emitted stage with random weights and a KV cache, and timings of its parts."""

    def __init__(self, program: Any) -> None:
        self.program = program
        shapes = {p["name"]: p["shape"] for p in program.PARAMETERS if p["per_layer"]}

        def layer() -> SimpleNamespace:
            return SimpleNamespace(
                **{name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}
            )

        self.w = layer()
        self.weight_bytes: int = sum(weight.nbytes for weight in vars(self.w).values())
        self.layers = [layer() for _ in range(-(-COLD_BYTES // self.weight_bytes))]
        self.kv_heads: int
        self.dim: int
        self.kv_heads, _, page_size, self.dim = program.KV_SHAPE
        pages = -(-DECODE_CONTEXT // page_size) + 1
        self.k, self.v = (torch.randn(self.kv_heads, pages, page_size, self.dim) for _ in range(2))
        self.hidden: int = self.w.attention_norm.shape[0]
        self.heads: int = self.w.w_o.shape[1] // self.dim

    def figures(self) -> dict[str, float]:
        square, big = torch.randn(1024, 1024), torch.randn(1 << 26)
        speeds = {"matmul": self.matmul_flops(), "attention_prefill": self.prefill_flops()}
        streams = {"attention_decode": self.decode_bytes(), "memory": self.memory_bytes()}
        peak = max(2 * 1024**3 / self.median_s(lambda: square @ square), *speeds.values())
        bandwidth = max(big.nbytes / self.median_s(big.amax), *streams.values())
        return {
            "peak": peak,
            "bandwidth": bandwidth,
            **{name: speed / peak for name, speed in speeds.items()},
            **{name: stream / bandwidth for name, stream in streams.items()},
            "launch_s": self.launch_s(streams["memory"]),
        }

    def matmul_flops(self) -> float:
        """FLOP/s of a chunk through the four weights of a layer."""
        linear = torch.nn.functional.linear
        weights = [self.w.w_qkv, self.w.w_o, self.w.w_gate_up, self.w.w_down]
        rows = [torch.randn(CHUNK, weight.shape[1]) for weight in weights]
        flops: int = sum(2 * CHUNK * weight.numel() for weight in weights)
        pairs = list(zip(rows, weights, strict=True))
        return flops / self.median_s(lambda: [linear(x, weight) for x, weight in pairs])

    def prefill_flops(self) -> float:
        kernel = self.program.attention_prefill
        q, out, lse = self.rows(CHUNK)
        plan = kernel.prepare(self.segments(CHUNK, CONTEXT + CHUNK))
        seconds = self.median_s(lambda: kernel.attention_prefill(q, self.k, self.v, plan, out, lse))
        pairs = CHUNK * CONTEXT + CHUNK * (CHUNK + 1) // 2
        return 4 * pairs * self.heads * self.dim / seconds

    def decode_bytes(self) -> float:
        kernel = self.program.attention_decode
        q, out, lse = self.rows(1)
        plan = kernel.prepare(self.segments(1, DECODE_CONTEXT))
        seconds = self.median_s(lambda: kernel.attention_decode(q, self.k, self.v, plan, out, lse))
        return 2 * DECODE_CONTEXT * self.kv_heads * self.dim * 4 / seconds

    def memory_bytes(self) -> float:
        """B/s of weights that are read for one row."""
        linear = torch.nn.functional.linear
        weights = [w for layer in self.layers for w in vars(layer).values() if w.dim() == 2]
        rows = [torch.randn(1, weight.shape[1]) for weight in weights]
        pairs = list(zip(rows, weights, strict=True))
        seconds = self.median_s(lambda: [linear(x, weight) for x, weight in pairs])
        read: int = sum(weight.nbytes for weight in weights)
        return read / seconds

    def launch_s(self, bandwidth: float) -> float:
        """Host time per op: one row through whole layers, less their weights' way from memory."""
        p = self.program
        pos = torch.zeros(1, dtype=torch.int64)
        segments = self.segments(1, 16)
        values = {
            "k_cache": self.k,
            "v_cache": self.v,
            "batch": Batch(pos, pos, pos, pos, 1, segments, None, ()),
            "decode": p.attention_decode.prepare(segments),
            "prefill": None,
            "comm": SimpleNamespace(tp=None, kvp=None),
            "x": torch.randn(1, self.hidden),
            "rot": torch.ones(1, 2, self.dim // 2),
        }
        names = p.layer.__code__.co_varnames[: p.layer.__code__.co_argcount]
        given = [
            [values.get(name, layer) for name in names]  # "w" is the layer's own
            for layer in self.layers
        ]
        seconds = self.median_s(lambda: [p.layer(*arguments) for arguments in given])
        each = seconds / len(self.layers)
        return max(each - self.weight_bytes / bandwidth, 0.1 * each) / OPS

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = torch.randn(count, self.heads, self.dim)
        return q, torch.empty_like(q), torch.empty(q.shape[:2])

    def segments(self, rows: int, kv_len: int) -> Segments:
        page_size = self.program.KV_SHAPE[2]

        def table(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        pages = torch.arange(-(-kv_len // page_size), dtype=torch.int32)[None]
        return Segments(table(0, rows), table(kv_len), table(kv_len - rows), pages, rows, kv_len)

    def median_s(self, run: Callable[[], object], least_s: float = 0.4) -> float:
        return _median_s(run, least_s)


def _link_figures() -> dict[str, float]:
    """Rank pairs (0, 1), (2, 3), … send to and fro; alone, the figures of a memory copy stand in."""
    rank, world = dist.get_rank(), dist.get_world_size()
    peer = rank ^ 1
    if world == 1 or peer >= world:
        buffer = torch.zeros(_MESSAGE_BYTES // 4)
        seconds = _median_s(buffer.clone, 0.1)
        return {"latency_s": seconds, "link": _MESSAGE_BYTES / seconds}

    def round_trip(message: torch.Tensor) -> None:
        for sender in (rank & ~1, rank | 1):
            dist.send(message, peer) if sender == rank else dist.recv(message, peer)

    times: list[float] = []
    for count, repeats in ((2, 200), (_MESSAGE_BYTES // 4, 40)):
        message = torch.zeros(count)
        samples = []
        for _ in range(repeats):
            started = time.perf_counter()
            round_trip(message)
            samples.append((time.perf_counter() - started) / 2)
        times.append(statistics.median(samples))
    small, large = times
    return {"latency_s": small, "link": _MESSAGE_BYTES / max(large - small, 1e-9)}


def _median_s(run: Callable[[], object], least_s: float) -> float:
    """Median time of a call, repeated for at least `least_s`; all processes start together."""
    run()
    dist.barrier()
    times: list[float] = []
    end = time.perf_counter() + least_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 2000):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(sys.argv[1:])
