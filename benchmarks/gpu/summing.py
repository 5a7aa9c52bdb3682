"""Sums over tensor-parallel ranks, made by the kernel that reads them: here the ranks' buffers are all local.

So what is measured is the kernel by one device's memory: its time, and its bytes as a share of what a copy
reaches. What the link adds, and the meeting before, takes as many devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import reference, work
from .device import Run
from .kernels import kernel_spec
from .rowwise import ELEMENT, Work
from .runner import Setup
from .sizes import Row

RANKS = 8
MOST_ROWS = 512
"""More than any plan reads so: NCCL makes sums of many rows."""


class Sums:
    """The partial sums of all ranks, added to a residual and normed."""

    def __init__(self, setup: Setup, shape: Row) -> None:
        self.setup, self.hidden, self.device = setup, shape.hidden, setup.device.place
        self.spec = kernel_spec(
            setup.device.target,
            shape.heads,
            setup.device.dtype,
            hidden=shape.hidden,
            ffn=shape.ffn,
            sum_ranks=RANKS,
        )
        self.module = setup.kernels.load(self.spec, "all_reduce")

    def works(self, rows: int) -> list[Work]:
        """Each call gives the parts back too, so that they live as long as their addresses."""
        if rows > MOST_ROWS:
            return []

        def summed() -> Run:
            parts, residual = self._partial(rows)
            addresses = _addresses(parts)
            return lambda: (self.module.all_reduce_add(addresses, residual), parts)

        def normed() -> Run:
            parts, residual = self._partial(rows)
            addresses, weight = _addresses(parts), self._randn(self.hidden)
            call = self.module.all_reduce_add_rms_norm
            return lambda: (call(addresses, residual, weight), parts)

        given = rows, RANKS, self.hidden, ELEMENT
        return [
            Work("all_reduce_add", work.all_reduce_add_bytes(*given), summed),
            Work("all_reduce_add_rms_norm", work.all_reduce_add_rms_norm_bytes(*given), normed),
        ]

    def errors(self, rows: int) -> Iterator[tuple[str, float]]:
        """Relative errors by kernel; the sums must be the same to the last bit wherever the parts lie."""
        parts, residual = self._partial(min(rows, MOST_ROWS))
        weight = self._randn(self.hidden)
        expected = parts.double().sum(0) + residual.double()
        moved = parts.clone()
        found = [
            self.module.all_reduce_add_rms_norm(_addresses(where), residual, weight)
            for where in (parts, moved)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "ranks would differ"
        y, total = found[0]
        yield "all_reduce_add_rms_norm, sum", reference.relative_error(total, expected)
        norm = reference.rms_norm(total, weight, self.spec.norm_eps)
        yield "all_reduce_add_rms_norm", reference.relative_error(y, norm)
        self.module.all_reduce_add(_addresses(parts), residual)
        assert torch.equal(residual, total), "with a norm or without, the sum is the same"
        yield "all_reduce_add", reference.relative_error(residual, expected)

    def _partial(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._randn(RANKS, rows, self.hidden), self._randn(rows, self.hidden)

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.setup.device.dtype, device=self.device)


def _addresses(parts: torch.Tensor) -> torch.Tensor:
    starts = [part.data_ptr() for part in parts]
    return torch.tensor(starts, dtype=torch.int64, device=parts.device)
