"""What the device reaches at most, measured: every other figure is a share of these.

`copy` counts the bytes read and written by a copy within the device's memory; `bfloat16` and `float8` are
square products by PyTorch's library, on random data (zeros run faster).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import work
from .kernels import FP8
from .runner import Case, Figures, Section, Setup
from .timing import race


def cases(setup: Setup) -> Sequence[Case]:
    return [
        Case("copy", lambda: _copy(setup)),
        Case("bfloat16", lambda: _product(setup)),
        Case("float8", lambda: _product_fp8(setup)),
    ]


def _copy(setup: Setup) -> list[Figures]:
    count = setup.sizes.copy_bytes // 2
    source = torch.randn(count, dtype=torch.bfloat16, device=setup.device.place)
    target = torch.empty_like(source)
    return _row(setup, "copy", 2 * source.nbytes, lambda: target.copy_(source), f"{count * 2} B")


def _product(setup: Setup) -> list[Figures]:
    n, device = setup.sizes.product, setup.device.place
    left, right = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(left)
    flops = work.product_flops(n, n, n)
    return _row(setup, "bfloat16", flops, lambda: torch.mm(left, right, out=out), f"{n} cubed")


def _product_fp8(setup: Setup) -> list[Figures]:
    """Scaled by tensor: what row-wise scales cost more is no ceiling's business."""
    n, device = setup.sizes.product, setup.device.place
    left, right = (torch.randn(n, n, device=device).to(FP8) for _ in range(2))
    scale = torch.ones((), device=device)
    flops = work.product_flops(n, n, n)

    def run() -> torch.Tensor:
        return torch._scaled_mm(
            left, right.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _row(setup, "float8", flops, run, f"{n} cubed")


def _row(setup: Setup, name: str, amount: int, run: object, what: str) -> list[Figures]:
    assert callable(run)
    timing = race(setup.device, {name: [run]}, 4 * setup.sizes.least_s)[name]
    return [
        {
            "ceiling": name,
            "of": what,
            "rate": amount / timing.median_s,
            "unit": "B/s" if name == "copy" else "FLOP/s",
            "median_s": timing.median_s,
            "least_s": timing.least_s,
            "most_s": timing.most_s,
        }
    ]


SECTION = Section("ceilings", "Ceilings of this device, measured", cases)
