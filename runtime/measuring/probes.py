"""One of the processes that measure a machine: `python -m mnemoc.runtime.measuring.probes DIR SIZES CREW`.

DIR is the artifact of a plan for one rank, whose kernels are timed; SIZES is "full" or "quick"; CREW is
"alone", what one process reaches with the machine to itself, or "together", what each of several reaches
while all of them measure the same. Prints the share that is done, line by line, then a JSON object:
figure → [[size, rate], ...].

Times are medians over repeats, and of three rounds the best, for a machine has better and worse seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from ...folder import load_artifact
from ...microbatch import Batch, Segments
from ..loader import ArtifactModules
from ..rank import cores

COLD_BYTES = 96 << 20  # swept in turn, so that no cache keeps them
LAYER_TOKENS = 16
ROUNDS = 3
_REPEATS = 40  # of messages: both ends must agree on how often

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: rows of products; bytes of weights for one row; chunks and contexts of prefill;
    lengths of decode; bytes of messages; pages copied to host memory.
    """

    rows: tuple[int, ...]
    weights: tuple[int, ...]
    chunks: tuple[int, ...]
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    messages: tuple[int, ...]
    copies: tuple[int, ...]
    least_s: float


FULL = Sizes(
    rows=(16, 32, 64, 128, 256, 512),
    weights=(256 << 10, 1 << 20, 4 << 20, 16 << 20),
    chunks=(16, 64, 128, 256, 512),
    contexts=(1024, 8192),
    lengths=(256, 1024, 4096, 16384, 65536),
    messages=(64, 16 << 10, 256 << 10, 1 << 20, 4 << 20),
    copies=(1, 8, 64, 512),
    least_s=0.4,
)
QUICK = Sizes(
    rows=(16, 128, 512),
    weights=(1 << 20, 8 << 20),
    chunks=(16, 128, 512),
    contexts=(2048,),
    lengths=(256, 4096, 32768),
    messages=(64, 64 << 10, 1 << 20),
    copies=(1, 64),
    least_s=0.15,
)


@dataclass(frozen=True)
class Probe:
    """One thing that is timed. what: the figure that it belongs to; size: its place on the curve;
    work: FLOP, bytes or layers of one run. repeats: where processes must agree on how often; else by time.
    """

    what: str
    size: float
    work: float
    run: Callable[[], object]
    repeats: int | None = None

    def median_s(self, least_s: float) -> float:
        """Median time of a run; all processes start together."""
        self.run()
        dist.barrier()
        times: list[float] = []
        end = time.perf_counter() + least_s
        while len(times) < (self.repeats or 1) or (
            self.repeats is None and time.perf_counter() < end and len(times) < 2000
        ):
            started = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def main(argv: Sequence[str]) -> None:
    """Measure as one of the crew."""
    torch.set_num_threads(1)
    cores.settle(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), threads=1)
    manifest, contents = load_artifact(Path(argv[0]))
    sizes = QUICK if argv[1] == "quick" else FULL
    modules = ArtifactModules(Path(argv[0]), contents, ("kernels/", "schedule/"))
    with cores.giving_way():
        dist.init_process_group("gloo")
    with torch.inference_mode():
        bench = _Bench(modules.load(f"schedule.{manifest.plan.stages[0].role}"), sizes)
        rates = bench.rates([*(bench.alone() if argv[2] == "alone" else bench.together())])
    dist.destroy_process_group()
    print(json.dumps(rates))


class _Bench:
    """The emitted stage with random weights and a KV cache, and timings of its parts."""

    def __init__(self, program: Any, sizes: Sizes) -> None:
        self.program, self.sizes = program, sizes
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
        self.calls = self.arguments(1, LAYER_TOKENS)
        self.between = self.in_turn(self.calls)

    def rates(self, probes: Sequence[Probe]) -> dict[str, Points]:
        """Of each figure, (size, work per second) of its probes."""
        steps, done = ROUNDS * len(probes), 0
        seconds: list[list[float]] = [[] for _ in probes]
        for _ in range(ROUNDS):
            for probe, spent_s in zip(probes, seconds, strict=True):
                spent_s.append(probe.median_s(self.sizes.least_s / ROUNDS))
                done += 1
                print(done / steps, flush=True)
        found: dict[str, Points] = {}
        for probe, spent_s in zip(probes, seconds, strict=True):
            rate = probe.work / statistics.median(spent_s)
            found.setdefault(probe.what, []).append((probe.size, rate))
        if "link" in found:  # its probes compute in between
            ((_, computed),) = found.pop("between")
            found["link"] = [
                (size, size / max(size / rate - 1 / computed, 1e-6)) for size, rate in found["link"]
            ]
        return found

    def alone(self) -> Iterator[Probe]:
        """What memory bounds: one core may draw most of what there is for all."""
        big = torch.randn(1 << 26)
        yield Probe("stream", 0, big.nbytes, big.amax)
        yield from map(self.one_row, self.sizes.weights)
        yield from map(self.decode, self.sizes.lengths)
        yield self.layer()

    def together(self) -> Iterator[Probe]:
        """What arithmetic bounds, messages, and what memory has for all."""
        square = torch.randn(1024, 1024)
        yield Probe("product", 0, 2 * 1024**3, lambda: square @ square)
        yield from map(self.matmul, self.sizes.rows)
        yield from map(self.beginning, self.sizes.rows)
        yield from map(self.prefill, self.sizes.chunks)
        yield self.one_row(max(self.sizes.weights))
        yield self.decode(max(self.sizes.lengths))
        yield Probe("between", 0, 1, self.between, _REPEATS)
        yield from map(self.message, self.sizes.messages)
        yield from map(self.copy, self.sizes.copies)

    def matmul(self, rows: int) -> Probe:
        """FLOP of the four products of a layer; few rows sweep weights that no cache has."""
        layers = self.layers if rows < 64 else self.layers[:1]
        weights = [w for layer in layers for w in vars(layer).values() if w.dim() == 2]
        flops = 2 * rows * sum(weight.numel() for weight in weights)
        return Probe("matmul", rows, flops, self.products(rows, weights))

    def products(self, rows: int, weights: Sequence[torch.Tensor]) -> Callable[[], object]:
        linear = self.program.linear
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
        return lambda: [linear(inputs[w.shape[1]], w) for w in weights]

    def one_row(self, size: int) -> Probe:
        """Bytes of weights of some size, for one row."""
        weights = torch.randn(COLD_BYTES // size, size // self.hidden // 4, self.hidden)
        return Probe("memory", size, weights.nbytes, self.products(1, list(weights)))

    def prefill(self, chunk: int) -> Probe:
        """FLOP of chunks after each context; their size: rows that share a KV head's keys."""
        kernel = self.program.attention_prefill
        q, out, lse = self.rows(chunk)
        pairs = sum(chunk * n + chunk * (chunk + 1) / 2 for n in self.sizes.contexts)
        keys = sum(n + chunk for n in self.sizes.contexts)
        plans = [kernel.prepare(self.segments(chunk, n + chunk)) for n in self.sizes.contexts]
        return Probe(
            "attention_prefill",
            pairs * self.heads / self.kv_heads / keys,
            4 * pairs * self.heads * self.dim,
            lambda: [kernel.attention_prefill(q, self.k, self.v, p, out, lse) for p in plans],
        )

    def decode(self, length: int) -> Probe:
        """Bytes of K and V; calls go round the cache, as the layers of a model do."""
        kernel = self.program.attention_decode
        q, out, lse = self.rows(1)
        pages = -(-length // self.page_size)
        count = min(64, self.pages // pages)
        plans = [
            kernel.prepare(self.segments(1, length, first=i * (self.pages // count)))
            for i in range(count)
        ]
        read = length * self.token_bytes
        return Probe(
            "attention_decode",
            read,
            count * read,
            lambda: [kernel.attention_decode(q, self.k, self.v, p, out, lse) for p in plans],
        )

    def layer(self) -> Probe:
        """Layers, for one row after LAYER_TOKENS tokens."""
        run = self.program.layer
        return Probe("layer", 0, len(self.calls), lambda: [run(*call) for call in self.calls])

    def beginning(self, rows: int) -> Probe:
        """Layers, for a prompt's first rows: products among all else, on weights that no cache has."""
        return Probe("layers", rows, 1, self.in_turn(self.arguments(rows, rows)))

    def in_turn(self, calls: Sequence[Sequence[object]]) -> Callable[[], object]:
        """A run is one layer, the next run the next."""
        turn = itertools.cycle(calls)
        return lambda: self.program.layer(*next(turn))

    def arguments(self, rows: int, tokens: int) -> list[list[object]]:
        """What the program's `layer` is called with for the last rows of so many tokens; one row is a decode.

        Weights are those of each layer in turn, all else is the same.
        """
        p = self.program
        at = torch.arange(tokens - rows, tokens)
        segments = self.segments(rows, tokens)
        one = rows == 1
        values = {
            "k_cache": self.k,
            "v_cache": self.v,
            "batch": Batch(
                at, at, at, at[-1:], one, segments if one else None, None if one else segments, ()
            ),
            "decode": p.attention_decode.prepare(segments) if one else None,
            "prefill": None if one else p.attention_prefill.prepare(segments),
            "comm": SimpleNamespace(tp=None, kvp=None),
            "x": torch.randn(rows, self.hidden),
            "normed": torch.randn(rows, self.hidden),
            "rot": torch.ones(rows, 2, self.dim // 2),
        }
        names = p.layer.__code__.co_varnames[: p.layer.__code__.co_argcount]
        return [
            [values.get(name, layer) for name in names]  # "w" is the layer's own, "next_w" as good
            for layer in self.layers
        ]

    def message(self, size: int) -> Probe:
        """Bytes that each of the rank pairs (0, 1), (2, 3), … swaps; alone, a copy in memory stands in.

        Both ways at once and after a layer, as in every exchange of a plan: the two directions share a
        loopback, and threads that slept while a core was busy take their time to wake.
        """
        rank, mine = dist.get_rank(), torch.zeros(size // 4)
        peer = rank ^ 1

        def exchange() -> None:
            self.between()
            theirs = torch.empty_like(mine)
            if peer >= dist.get_world_size():
                theirs.copy_(mine)
                return
            swap = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(swap):
                work.wait()

        return Probe("link", size, size, exchange, _REPEATS)

    def copy(self, count: int) -> Probe:
        """Bytes of scattered pages of a layer's K and V, to slots of another buffer: a swap, where the host's
        memory is the device's own. Each run takes other pages, which no cache has.
        """
        turns = max(1, COLD_BYTES // (count * self.page_size * self.token_bytes))
        pages = torch.randperm(self.pages)[: turns * count].view(turns, count)
        slots = torch.randperm(count)
        hosts = [
            cache.new_empty(self.kv_heads, count, *cache.shape[2:]) for cache in (self.k, self.v)
        ]
        turn = itertools.cycle(pages)

        def run() -> None:
            chosen = next(turn)
            for host, cache in zip(hosts, (self.k, self.v), strict=True):
                host.index_copy_(1, slots, cache.index_select(1, chosen))

        size = count * self.page_size * self.token_bytes
        return Probe("host", size, size, run)

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = torch.randn(count, self.heads, self.dim)
        return q, torch.empty_like(q), torch.empty(q.shape[:2])

    def segments(self, rows: int, kv_len: int, first: int = 0) -> Segments:
        """One segment on pages from `first` on."""

        def table(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        pages = torch.arange(first, first - (-kv_len // self.page_size), dtype=torch.int32)[None]
        return Segments(table(0, rows), table(kv_len), table(kv_len - rows), pages, rows, kv_len)


if __name__ == "__main__":
    main(sys.argv[1:])
