"""The CPU's matrix product of few rows against float64, and torch's where there are many or no compiler."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.codegen.kernels import FEW_ROWS, render_kernels
from mnemoc.runtime.loader import ArtifactModules

COMPILERS = {
    "as it is": "cc",
    "8 lanes": "cc -mno-avx512f",
    "4 lanes": "cc -mno-avx",
    "none": "false",
}


@pytest.fixture(scope="module", params=COMPILERS)
def module(request: Any, kit: Any) -> ModuleType:
    """The kernel, by each width of vectors, and without a compiler."""
    contents = {path: text.encode() for path, text in render_kernels(kit.spec("cpu")).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", COMPILERS[request.param])
        # A directory of its own, for modules of one artifact are loaded once.
        loaded = ArtifactModules(Path(request.param), contents, ("kernels/",)).load(
            "kernels.linear"
        )
    assert (loaded.COMPILED is None) == (request.param == "none")
    return loaded


def check(module: ModuleType, rows: int, out: int, width: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows * out * width)
    x, w = (torch.randn(n, width, generator=generator) for n in (rows, out))
    bias = torch.randn(out, generator=generator) if biased else None
    expected = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        y = module.linear(x, w, bias)
    torch.testing.assert_close(y.double(), expected, atol=3e-6 * width**0.5, rtol=0)


@pytest.mark.parametrize("rows", range(1, FEW_ROWS + 3))
def test_every_count_of_rows(rows: int, module: ModuleType) -> None:
    check(module, rows, out=67, width=96, biased=rows % 2 == 0)


@given(
    rows=st.integers(0, 9), out=st.integers(1, 70), width=st.integers(1, 70), biased=st.booleans()
)
def test_no_size_needs_to_be_a_multiple_of_anything(
    module: ModuleType, rows: int, out: int, width: int, biased: bool
) -> None:
    check(module, rows, out, width, biased)


def test_rows_that_do_not_lie_one_behind_the_other(module: ModuleType) -> None:
    wide, w = torch.randn(3, 64), torch.randn(20, 32)
    torch.testing.assert_close(module.linear(wide[:, ::2], w), F.linear(wide[:, ::2], w))
