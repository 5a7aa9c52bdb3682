"""The row-wise kernels, the merge and sums over ranks: bytes per second as a share of what a copy reaches.

Few rows are bound by the launch, not by memory: their time is the figure that counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from .rowwise import Merge, RowKernels, Work
from .runner import Case, Figures, Section, Setup
from .sizes import Row
from .summing import Sums
from .timing import copies, race


def cases(setup: Setup) -> Sequence[Case]:
    return [
        Case(
            f"{shape.heads.name}, {rows} rows",
            lambda shape=shape, rows=rows: _case(setup, shape, rows),  # type: ignore[misc]
        )
        for rows in reversed(setup.sizes.counts)
        for shape in setup.sizes.shapes
    ]


def _case(setup: Setup, shape: Row, rows: int) -> list[Figures]:
    kinds = RowKernels(setup, shape), Merge(setup, shape), Sums(setup, shape)
    works = [work for kind in kinds for work in kind.works(rows)]
    return [_measured(setup, shape, rows, work) for work in works]


def _measured(setup: Setup, shape: Row, rows: int, work: Work) -> Figures:
    device = setup.device
    calls = [work.make() for _ in range(copies(work.bytes, device.machine.cache_bytes))]
    timing = race(device, {work.name: calls}, setup.sizes.least_s / 3)[work.name]
    rate = work.bytes / timing.median_s
    return {
        "kernel": work.name,
        "of": shape.heads.name,
        "rows": rows,
        "bytes": work.bytes,
        "median_s": timing.median_s,
        "bytes_per_s": rate,
        "share_of_copy": setup.share(rate, "copy"),
        "how": timing.how,
    }


SECTION = Section("rows", "Row-wise kernels, the merge across KVP and sums over tp", cases)
