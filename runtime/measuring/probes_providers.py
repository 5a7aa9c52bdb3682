"""Measures our attention beside that of others, at the sizes by which a plan chooses between them.

All are given the same keys and values, in pages of the size that each takes; one that does not give what ours
gives is left out, and why is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

from .attending import Paged, Run, pages_of
from .clocks import Race

AGREES = 2e-2
"""Relative difference of two 16-bit results of the same function: twice what each may err."""


@dataclass(frozen=True)
class Points:
    """Where speeds are measured.

    prefill: (tokens of a chunk, keys it sees at its end); decode: (requests, keys of each)
    cold: bytes that no cache holds
    """

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int], ...]
    cold: int

    def tokens(self, page: int) -> int:
        """That a cache of such pages must hold for each of them."""
        requests = [*((1, keys) for _, keys in self.prefill), *self.decode]
        return page * max(count * pages_of([keys], page) for count, keys in requests)


K = 1 << 10
FULL = Points(
    prefill=tuple((c, n * K) for c in (32, 128, 512, 2048, 8192) for n in (16, 128, 512)),
    decode=tuple((r, n * K) for r, n in ((1, 8), (1, 128), (1, 1024), (8, 64), (64, 8), (64, 16))),
    cold=192 << 20,
)
QUICK = Points(
    prefill=tuple((c, 64 * K) for c in (32, 512, 2048)),
    decode=((1, 8 * K), (1, 128 * K), (16, 8 * K)),
    cold=192 << 20,
)


@dataclass(frozen=True)
class Kernel:
    """The module that serves an op by somebody, and the pages that it is given."""

    module: ModuleType
    page: int


@dataclass(frozen=True)
class Speeds:
    """Of one op, by provider: [size, keys, speed] as a cluster file has them. refused: others, and why."""

    points: Mapping[str, list[tuple[float, float, float]]]
    refused: Mapping[str, str]


def measure(
    op: str, kernels: Mapping[str, Kernel], ours: str, paged: Paged, points: Points, race: Race
) -> Speeds:
    """FLOP/s of "attention_prefill", or B/s of K and V of "attention_decode", of all that agree with ours."""
    refused = {}
    for name, kernel in kernels.items():
        if name != ours and (why := _differs(op, kernel, kernels[ours], paged, points)):
            refused[name] = why
    agreed = {name: kernel for name, kernel in kernels.items() if name not in refused}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in agreed}
    cases = _prefill(paged, points) if op == "attention_prefill" else _decode(paged, points)
    for size, keys, work, calls in sorted(cases, key=lambda case: case[:2]):
        times = race({name: calls(op, kernel) for name, kernel in agreed.items()})
        for name, spent_s in times.items():
            found[name].append((size, keys, work / spent_s))
    return Speeds(found, refused)


_Case = tuple[float, float, float, Callable[[str, Kernel], list[Run]]]
"""The size and keys as `Speeds` have them; FLOP or bytes of a call; an op and its kernel → calls."""


def _prefill(paged: Paged, points: Points) -> Iterator[_Case]:
    for chunk, keys in points.prefill:
        pairs = chunk * (keys - chunk) + chunk * (chunk + 1) // 2
        flops = 4.0 * paged.dim * paged.heads * pairs
        yield chunk * paged.group, keys, flops, _calls(paged, chunk, [keys], points.cold)


def _decode(paged: Paged, points: Points) -> Iterator[_Case]:
    for requests, keys in points.decode:
        read = float(requests * keys * paged.token_bytes)
        yield requests, keys, read, _calls(paged, 1, [keys] * requests, points.cold)


def _calls(
    paged: Paged, rows: int, lengths: list[int], cold: int
) -> Callable[[str, Kernel], list[Run]]:
    return lambda op, kernel: paged.cold_calls(kernel.module, op, rows, lengths, kernel.page, cold)


def _differs(op: str, kernel: Kernel, ours: Kernel, paged: Paged, points: Points) -> str | None:
    """Why a kernel is not to be compared with ours: it raises, or gives something else."""
    rows, keys = min(points.prefill) if op == "attention_prefill" else (1, min(points.decode)[1])
    q = paged.queries(rows)
    outs = []
    try:
        for one in (ours, kernel):
            run, out = paged.call(one.module, op, q, [keys], one.page)
            run()
            outs.append(out.double())
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        if "CUDA error" in str(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    difference = float((outs[1] - outs[0]).norm() / outs[0].norm())
    if difference <= AGREES:
        return None
    return f"it computes something else: a relative difference of {difference:.2g}"
