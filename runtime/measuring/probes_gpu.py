"""Measures a GPU with the kernels that plans emit, and with the products of PyTorch's library.

Work is timed as the device does it, without Python in between: `Clock` is told calls of the same work on
different data, so that no cache keeps what they read, and answers with the median time of one. Between two
kernels lies a gap, `gap_s`, that is a figure of its own: every other figure is of the time beyond it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from .attending import Paged, Run, copies
from .clocks import Clock, graph_clock

Points = list[tuple[float, float]]

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """One rank of the model whose layer is measured."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    page: int


@dataclass(frozen=True)
class Sizes:
    """What is measured: rows of products; bytes of weights for one row; chunks after pasts; lengths of
    decodes.

    copy: bytes of the copy; pages: of a layer, copied to host memory; square: side of the product that tells
    the peak; cold: what no cache holds
    launches: from Python, of which the mean is taken
    """

    rows: tuple[int, ...]
    weights: tuple[int, ...]
    chunks: tuple[int, ...]
    pasts: tuple[int, ...]
    lengths: tuple[int, ...]
    copy: int
    pages: tuple[int, ...]
    square: int
    cold: int
    launches: int = 200


FULL = Sizes(
    rows=(256, 512, 1024, 2048, 4096, 8192),
    weights=(1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28),
    chunks=(32, 128, 512, 2048),
    pasts=(16 << 10, 128 << 10),
    lengths=(8 << 10, 32 << 10, 128 << 10, 1 << 20),
    copy=2 << 30,
    pages=(1, 8, 64, 512),
    square=8192,
    cold=192 << 20,
)
QUICK = Sizes(
    rows=(256, 1024, 4096),
    weights=(1 << 22, 1 << 26),
    chunks=(32, 512, 2048),
    pasts=(32 << 10,),
    lengths=(8 << 10, 128 << 10),
    copy=1 << 30,
    pages=(1, 64, 512),
    square=8192,
    cold=192 << 20,
)


@dataclass(frozen=True)
class Figures:
    """What was measured, in base units; points are [size, rate].

    peak_flops, peak_fp8_flops  the best of all products; None where there are no products of 8-bit floats
    bandwidth                   the best of all that streams
    matmul, matmul_fp8          FLOP/s of a layer's products, by rows
    attention_prefill           FLOP/s of chunks after pasts, by rows that share a KV head's keys
    attention_decode            B/s of one decode, by bytes of K and V
    memory                      B/s of products of one row, by bytes of their weights
    host                        B/s of a layer's K and V pages on their way to pinned memory, by bytes
    launch_s                    a launch from Python; gap_s: from kernel to kernel on the device
    """

    peak_flops: float
    peak_fp8_flops: float | None
    bandwidth: float
    matmul: Points
    matmul_fp8: Points
    attention_prefill: Points
    attention_decode: Points
    memory: Points
    host: Points
    launch_s: float
    gap_s: float


class Probes:
    """kernels: the modules `attention_prefill`, `attention_decode` and `rms_norm` of a plan, by name."""

    def __init__(
        self,
        kernels: Mapping[str, ModuleType],
        shape: Shape,
        sizes: Sizes,
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock = graph_clock,
    ) -> None:
        self.kernels, self.shape, self.sizes = kernels, shape, sizes
        self.device, self.dtype, self.clock = device, dtype, clock
        self.gap_s = 0.0

    def measure(self, progress: Callable[[float], None] = lambda share: None) -> Figures:
        """All figures. progress: the share that is done."""
        with torch.no_grad():
            self.gap_s, launch_s = self._gap_s(), self._launch_s()
            progress(0.05)
            stream = self._rate(2 * self.sizes.copy, [self._copy()])
            memory = [(float(size), self.one_row(size)) for size in self.sizes.weights]
            progress(0.2)
            best = self._square(self.dtype)
            matmul = [(float(rows), self.products(rows)) for rows in self.sizes.rows]
            progress(0.4)
            best_fp8, matmul_fp8 = self._fp8()
            progress(0.6)
            paged = self._paged()
            prefill = [self.prefill(chunk, paged) for chunk in self.sizes.chunks]
            progress(0.9)
            decode = [self.decode(length, paged) for length in self.sizes.lengths]
            host = [self.to_host(count, paged) for count in self.sizes.pages]
            progress(1.0)
        return Figures(
            peak_flops=max(best, *_rates(matmul), *_rates(prefill)),
            peak_fp8_flops=max(best_fp8, *_rates(matmul_fp8)) if matmul_fp8 else None,
            bandwidth=max(stream, *_rates(memory), *_rates(decode)),
            matmul=matmul,
            matmul_fp8=matmul_fp8,
            attention_prefill=prefill,
            attention_decode=decode,
            memory=memory,
            host=host,
            launch_s=launch_s,
            gap_s=self.gap_s,
        )

    def products(self, rows: int) -> float:
        """FLOP/s of the four products of a layer."""
        calls, flops = [], 0
        for out, columns in self._weights():
            weight = self._randn(out, columns)
            x = self._randn(rows, columns)
            calls.append(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
            flops += 2 * rows * out * columns
        return self._rate(flops / len(calls), calls)

    def one_row(self, size: int) -> float:
        """B/s of products of one row with weights of some size."""
        columns = self.shape.hidden
        x = self._randn(1, columns)
        out = max(1, size // (columns * self.dtype.itemsize))
        weights = [self._randn(out, columns) for _ in range(copies(size, self.sizes.cold))]
        calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
        return self._rate(weights[0].nbytes, calls)

    def prefill(self, chunk: int, paged: Paged) -> tuple[float, float]:
        """Rows that share a KV head's keys, and FLOP/s: of a chunk after each past, together."""
        shape, name = self.shape, "attention_prefill"
        q, module = paged.queries(chunk), self.kernels[name]
        calls = [
            paged.call(module, name, q, [past + chunk], shape.page)[0] for past in self.sizes.pasts
        ]
        pairs = sum(chunk * past + chunk * (chunk + 1) // 2 for past in self.sizes.pasts)
        keys = sum(past + chunk for past in self.sizes.pasts)
        flops = 4 * shape.dim * shape.heads * pairs
        return pairs * shape.heads / shape.kv_heads / keys, self._rate(flops / len(calls), calls)

    def decode(self, length: int, paged: Paged) -> tuple[float, float]:
        """Bytes of K and V of one request, and B/s."""
        name, read = "attention_decode", length * paged.token_bytes
        calls = paged.cold_calls(
            self.kernels[name], name, 1, [length], self.shape.page, self.sizes.cold
        )
        return float(read), self._rate(read, calls)

    def to_host(self, count: int, paged: Paged) -> tuple[float, float]:
        """Bytes of scattered pages of K and V, and B/s: gathered, and copied to pinned memory."""
        k, v = paged.paged(self.shape.page)
        pages = torch.randperm(k.shape[1], device=self.device)[:count]
        pinned = self.device.type == "cuda"
        hosts = [
            torch.empty(k.shape[0], len(pages), *k.shape[2:], dtype=k.dtype, pin_memory=pinned)
            for _ in range(2)
        ]

        def run() -> None:
            for host, cache in zip(hosts, (k, v), strict=True):
                host.copy_(cache.index_select(1, pages), non_blocking=True)

        size = sum(host.nbytes for host in hosts)
        return float(size), self._rate(size, [run])

    def _rate(self, work: float, calls: Sequence[Run]) -> float:
        """Work per second of one call, of the time beyond the gap to the next."""
        spent_s = self.clock(calls)
        return work / max(spent_s - self.gap_s, spent_s / 2)

    def _paged(self) -> Paged:
        """Room for the longest of all, and for as much as no cache holds."""
        shape, sizes = self.shape, self.sizes
        longest = max(*sizes.lengths, *(past + max(sizes.chunks) for past in sizes.pasts))
        token = 2 * shape.kv_heads * shape.dim * self.dtype.itemsize
        pages = -(-max(longest, math.ceil(sizes.cold / token)) // shape.page)
        heads = (shape.heads, shape.kv_heads, shape.dim)
        return Paged(*heads, pages * shape.page, self.device, self.dtype)

    def _weights(self) -> Iterator[tuple[int, int]]:
        """(rows, columns) of the weights of a layer."""
        shape = self.shape
        yield (shape.heads + 2 * shape.kv_heads) * shape.dim, shape.hidden
        yield shape.hidden, shape.heads * shape.dim
        yield 2 * shape.ffn, shape.hidden
        yield shape.hidden, shape.ffn

    def _copy(self) -> Run:
        source = self._randn(self.sizes.copy // self.dtype.itemsize)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _square(self, dtype: torch.dtype) -> float:
        n = self.sizes.square
        left, right = self._randn(n, n), self._randn(n, n)
        return self._rate(2 * n**3, [lambda: left @ right])

    def _fp8(self) -> tuple[float, Points]:
        """Best FLOP/s, and by rows, of products of e4m3 with a scale per row; none before Hopper."""
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) < (8, 9):
            return 0.0, []
        points = []
        for rows in self.sizes.rows:
            calls, flops = [], 0
            for out, columns in self._weights():
                calls.append(self._scaled(rows, out, columns))
                flops += 2 * rows * out * columns
            points.append((float(rows), self._rate(flops / len(calls), calls)))
        n = self.sizes.square
        return self._rate(2 * n**3, [self._scaled(n, n, n)]), points

    def _scaled(self, rows: int, out: int, columns: int) -> Run:
        x, weight = self._randn(rows, columns).to(FP8), self._randn(out, columns).to(FP8)
        x_scale = torch.rand(rows, 1, device=self.device)
        scale = torch.rand(1, out, device=self.device)
        return lambda: torch._scaled_mm(
            x, weight.t(), x_scale, scale, out_dtype=self.dtype, use_fast_accum=True
        )

    def _gap_s(self) -> float:
        """From one small kernel to the next that needs its result."""
        norm = self._small()
        return self.clock([norm] * 64)

    def _launch_s(self) -> float:
        """What the host needs for a launch from Python, the device being far behind or not."""
        norm, count = self._small(), self.sizes.launches
        norm()
        times = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(count):
                norm()
            times.append((time.perf_counter() - started) / count)
        return statistics.median(times)

    def _small(self) -> Run:
        x, weight = self._randn(1, self.shape.hidden), self._randn(self.shape.hidden)
        return lambda: self.kernels["rms_norm"].rms_norm(x, weight)

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


def _rates(points: Points) -> list[float]:
    return [rate for _, rate in points]
