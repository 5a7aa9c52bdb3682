"""Measures this machine with the kernels that plans emit: `python -m mnemoc.runtime.calibrate DIR`.

`measure` starts one process per core, each with one thread, and lets all of them measure at once:
that is how the workers of a plan share caches and memory bandwidth. DIR is the artifact of a plan
for one rank. Times are medians over repeats; rates are means over the processes.

    peak_flops, bandwidth    the best of everything below, of a large product and of a long reduction
    matmul                   FLOP/s of a layer's products, by rows
    attention_prefill        FLOP/s of chunks after a past, by rows that share a KV head's keys
    attention_decode         B/s of one decode, by bytes of K and V
    memory                   B/s of products of one row, by bytes of their weights
    layer_s                  a whole layer for one row, after LAYER_TOKENS tokens
    link                     B/s of messages between processes, by bytes
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

COLD_BYTES = 96 << 20  # swept in turn, so that no cache keeps them
LAYER_TOKENS = 16
_TIMEOUT_S = 300

Points = list[tuple[float, float]]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Sizes:
    """What is measured: rows of products; bytes of weights for one row; chunks and contexts of prefill;
    lengths of decode; bytes of messages.
    """

    rows: tuple[int, ...]
    weights: tuple[int, ...]
    chunks: tuple[int, ...]
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    messages: tuple[int, ...]
    least_s: float

    @property
    def steps(self) -> int:
        """Measurements in all: with the two ceilings and the layer."""
        chunks = len(self.chunks) * len(self.contexts)
        others = (self.rows, self.weights, self.lengths, self.messages)
        return 3 + chunks + sum(map(len, others))


FULL = Sizes(
    rows=(1, 4, 16, 64, 128, 256, 512),
    weights=(256 << 10, 1 << 20, 4 << 20, 16 << 20),
    chunks=(16, 64, 128, 256, 512),
    contexts=(1024, 8192),
    lengths=(256, 1024, 4096, 16384, 65536),
    messages=(64, 16 << 10, 256 << 10, 1 << 20, 4 << 20),
    least_s=0.4,
)
QUICK = Sizes(
    rows=(1, 16, 128, 512),
    weights=(1 << 20, 8 << 20),
    chunks=(16, 128, 512),
    contexts=(2048,),
    lengths=(256, 4096, 32768),
    messages=(64, 64 << 10, 1 << 20),
    least_s=0.15,
)


@dataclass(frozen=True)
class Figures:
    """What was measured, in base units; points are [size, rate]."""

    peak_flops: float
    bandwidth: float
    matmul: Points
    attention_prefill: Points
    attention_decode: Points
    memory: Points
    layer_s: float
    link: Points


def measure(
    directory: Path, workers: int, quick: bool, progress: Progress = lambda fraction: None
) -> Figures:
    """Everything above, from `workers` processes that measure side by side. progress: what is done."""
    command = [sys.executable, "-m", "mnemoc.runtime.calibrate", str(directory)]
    port = _free_port()
    processes = []
    for rank in range(workers):
        env = worker_environment() | {"RANK": str(rank), "WORLD_SIZE": str(workers)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [*command, "quick" if quick else "full"],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )

    def stop() -> None:
        for process in processes:
            process.kill()

    late = threading.Timer(_TIMEOUT_S, stop)
    late.start()
    try:
        assert processes[0].stdout is not None
        first = ""
        for line in processes[0].stdout:  # fractions, then the figures as a JSON object
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
    return _mean([json.loads(line) for line in lines])


def _mean(measured: Sequence[Mapping[str, Any]]) -> Figures:
    """Single figures and rates averaged over the processes."""

    def mean(key: str) -> Any:
        values = [figures[key] for figures in measured]
        if not isinstance(values[0], list):
            return statistics.fmean(values)
        return [
            (points[0][0], statistics.fmean(rate for _, rate in points))
            for points in zip(*values, strict=True)
        ]

    return Figures(**{key: mean(key) for key in measured[0]})


def main(argv: Sequence[str]) -> None:
    """One of the processes: prints how far it is, line by line, then its figures as JSON."""
    torch.set_num_threads(1)
    manifest, contents = artifact.load(Path(argv[0]))
    sizes = QUICK if argv[1] == "quick" else FULL
    modules = ArtifactModules(Path(argv[0]), contents, ("kernels/", "schedule/"))
    dist.init_process_group("gloo")
    with torch.inference_mode():
        bench = _Bench(modules.load(f"schedule.{manifest.plan.stages[0].role}"), sizes)
        figures = bench.figures()
    dist.destroy_process_group()
    print(json.dumps(dataclasses.asdict(figures)))


class _Bench:
    """The emitted stage with random weights and a KV cache, and timings of its parts."""

    def __init__(self, program: Any, sizes: Sizes) -> None:
        self.program, self.sizes = program, sizes
        self.done = 0
        shapes = {p["name"]: p["shape"] for p in program.PARAMETERS if p["per_layer"]}

        def layer() -> SimpleNamespace:
            return SimpleNamespace(
                **{name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}
            )

        self.w = layer()
        weight_bytes: int = sum(weight.nbytes for weight in vars(self.w).values())
        self.layers = [layer() for _ in range(-(-COLD_BYTES // weight_bytes))]
        self.kv_heads: int
        self.dim: int
        self.kv_heads, _, self.page_size, self.dim = program.KV_SHAPE
        self.token_bytes = 2 * self.kv_heads * self.dim * 4
        cached = max(*sizes.lengths, *(n + max(sizes.chunks) for n in sizes.contexts))
        self.pages = max(cached, COLD_BYTES // self.token_bytes) // self.page_size + 1
        shape = (self.kv_heads, self.pages, self.page_size, self.dim)
        self.k, self.v = torch.randn(shape), torch.randn(shape)
        self.hidden: int = self.w.attention_norm.shape[0]
        self.heads: int = self.w.w_o.shape[1] // self.dim

    def figures(self) -> Figures:
        square, big = torch.randn(1024, 1024), torch.randn(1 << 26)
        matmul = [self.matmul(rows) for rows in self.sizes.rows]
        prefill = [self.prefill(chunk) for chunk in self.sizes.chunks]
        decode = [self.decode(length) for length in self.sizes.lengths]
        memory = [self.one_row(size) for size in self.sizes.weights]
        product = 2 * 1024**3 / self.median_s(lambda: square @ square)
        stream = big.nbytes / self.median_s(big.amax)
        return Figures(
            peak_flops=max(product, *(rate for _, rate in (*matmul, *prefill))),
            bandwidth=max(stream, *(rate for _, rate in (*decode, *memory))),
            matmul=matmul,
            attention_prefill=prefill,
            attention_decode=decode,
            memory=memory,
            layer_s=self.layer_s(),
            link=self.links(),
        )

    def matmul(self, rows: int) -> tuple[float, float]:
        """Rows → FLOP/s of the four products of a layer; few rows sweep weights that no cache has."""
        layers = self.layers if rows < 64 else self.layers[:1]
        weights = [w for layer in layers for w in vars(layer).values() if w.dim() == 2]
        seconds = self.products_s(rows, weights)
        return rows, 2 * rows * sum(weight.numel() for weight in weights) / seconds

    def one_row(self, size: int) -> tuple[float, float]:
        """Bytes of some weights → B/s of their product with one row."""
        weights = torch.randn(COLD_BYTES // size, size // self.hidden // 4, self.hidden)
        return size, weights.nbytes / self.products_s(1, list(weights))

    def products_s(self, rows: int, weights: Sequence[torch.Tensor]) -> float:
        linear = torch.nn.functional.linear
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
        return self.median_s(lambda: [linear(inputs[w.shape[1]], w) for w in weights])

    def prefill(self, chunk: int) -> tuple[float, float]:
        """Rows that share a KV head's keys → FLOP/s, over chunks after each context."""
        kernel = self.program.attention_prefill
        q, out, lse = self.rows(chunk)
        pairs = keys = seconds = 0.0
        for context in self.sizes.contexts:
            plan = kernel.prepare(self.segments(chunk, context + chunk))
            seconds += self.median_s(
                lambda plan=plan: kernel.attention_prefill(q, self.k, self.v, plan, out, lse)
            )
            pairs += chunk * context + chunk * (chunk + 1) / 2
            keys += context + chunk
        group = self.heads // self.kv_heads
        return pairs * group / keys, 4 * pairs * self.heads * self.dim / seconds

    def decode(self, length: int) -> tuple[float, float]:
        """Bytes of K and V → B/s; calls go round the cache, as the layers of a model do."""
        kernel = self.program.attention_decode
        q, out, lse = self.rows(1)
        pages = -(-length // self.page_size)
        count = min(64, self.pages // pages)
        plans = [
            kernel.prepare(self.segments(1, length, first=i * (self.pages // count)))
            for i in range(count)
        ]
        seconds = self.median_s(
            lambda: [kernel.attention_decode(q, self.k, self.v, p, out, lse) for p in plans]
        )
        read = length * self.token_bytes
        return read, count * read / seconds

    def layer_s(self) -> float:
        """One row through whole layers, after LAYER_TOKENS tokens."""
        p = self.program
        pos = torch.zeros(1, dtype=torch.int64)
        segments = self.segments(1, LAYER_TOKENS)
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
        return seconds / len(self.layers)

    def links(self) -> Points:
        """Rank pairs (0, 1), (2, 3), … send to and fro; alone, a copy in memory stands in."""
        rank, world = dist.get_rank(), dist.get_world_size()
        peer = rank ^ 1
        points = []
        for size in self.sizes.messages:
            message = torch.zeros(size // 4)
            if peer < world:
                seconds = self.round_trip_s(message, rank, peer) / 2
            else:
                seconds = self.median_s(message.clone)
            points.append((float(size), size / seconds))
        return points

    def round_trip_s(self, message: torch.Tensor, rank: int, peer: int) -> float:
        samples = []
        for _ in range(200 if message.nbytes < 1 << 20 else 40):
            started = time.perf_counter()
            for sender in (rank & ~1, rank | 1):
                dist.send(message, peer) if sender == rank else dist.recv(message, peer)
            samples.append(time.perf_counter() - started)
        self.step()
        return statistics.median(samples)

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = torch.randn(count, self.heads, self.dim)
        return q, torch.empty_like(q), torch.empty(q.shape[:2])

    def segments(self, rows: int, kv_len: int, first: int = 0) -> Segments:
        """One segment on pages from `first` on."""

        def table(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        pages = torch.arange(first, first - (-kv_len // self.page_size), dtype=torch.int32)[None]
        return Segments(table(0, rows), table(kv_len), table(kv_len - rows), pages, rows, kv_len)

    def median_s(self, run: Callable[[], object]) -> float:
        """Median time of a call, repeated for at least `least_s`; all processes start together."""
        run()
        dist.barrier()
        times: list[float] = []
        end = time.perf_counter() + self.sizes.least_s
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 2000):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        self.step()
        return statistics.median(times)

    def step(self) -> None:
        self.done += 1
        print(self.done / self.sizes.steps, flush=True)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(sys.argv[1:])
