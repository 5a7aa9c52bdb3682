"""Sums that kernels read from the ranks' memory: here all of it is this process's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mnemoc.ir.ops.e4m3 import scaled

pytestmark = pytest.mark.usefixtures("as_on_gpu")
ROWS = 3
CASES = [
    (2, 96, "bfloat16"),
    (3, 3584, "bfloat16"),
    (8, 1536, "bfloat16"),
    (4, 96, "float16"),
    (5, 96, "float32"),
]


class Ranks:
    """Each rank's partial sums, and where each rank sees them: nobody at the same addresses as another."""

    def __init__(self, count: int, width: int, dtype: torch.dtype) -> None:
        torch.manual_seed(count * width)
        self.parts = torch.randn(count, ROWS, width).to(dtype)
        self.residual, self.weight = (
            torch.randn(ROWS, width).to(dtype),
            torch.randn(width).to(dtype),
        )
        self.seen = [self.parts.clone() for _ in range(count)]
        self.addresses = [torch.tensor([part.data_ptr() for part in seen]) for seen in self.seen]

    @property
    def total(self) -> torch.Tensor:
        """In float32, in the order of the ranks, and rounded once."""
        total = self.parts[0].float()
        for part in self.parts[1:]:
            total = total + part.float()
        return (total + self.residual.float()).to(self.parts.dtype)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def ranks(request: pytest.FixtureRequest) -> Ranks:
    count, width, dtype = request.param
    return Ranks(count, width, getattr(torch, dtype))


@pytest.fixture
def module(ranks: Ranks, spec: Any, load: Any) -> Any:
    count, _, width = ranks.parts.shape
    dtype = str(ranks.parts.dtype).removeprefix("torch.")
    given = {"dtype": dtype, "sizes": (width, 160), "sum_ranks": count, "fp8": dtype == "bfloat16"}
    return load(spec("cuda:sm_90", **given), "all_reduce")


@torch.inference_mode()
def test_every_rank_has_the_same_sum_and_norm_to_the_last_bit(ranks: Ranks, module: Any) -> None:
    given = ranks.residual.clone()
    found = [module.all_reduce_add_rms_norm(a, given, ranks.weight) for a in ranks.addresses]
    norm = F.rms_norm(ranks.total.double(), (given.shape[1],), ranks.weight.double(), 1e-5)
    close = (
        {"atol": 3e-6, "rtol": 3e-6} if given.dtype == torch.float32 else {"atol": 0, "rtol": 8e-3}
    )
    for y, total in found:
        assert torch.equal(total, ranks.total)
        assert torch.equal(y, found[0][0])
        torch.testing.assert_close(y.double(), norm, **close)
    assert torch.equal(given, ranks.residual)
    assert all(torch.equal(seen, ranks.parts) for seen in ranks.seen), "what is read stays as it is"


@torch.inference_mode()
def test_without_a_norm_the_sum_is_written_over_the_residual(ranks: Ranks, module: Any) -> None:
    for addresses in ranks.addresses:
        residual = ranks.residual.clone()
        assert module.all_reduce_add(addresses, residual) is residual
        assert torch.equal(residual, ranks.total)


@torch.inference_mode()
def test_the_norm_as_e4m3_is_the_same_on_every_rank(ranks: Ranks, module: Any) -> None:
    if ranks.parts.dtype != torch.bfloat16:
        assert not hasattr(module, "all_reduce_add_rms_norm_fp8")
        return
    found = [
        module.all_reduce_add_rms_norm_fp8(a, ranks.residual, ranks.weight) for a in ranks.addresses
    ]
    norm = F.rms_norm(ranks.total.double(), ranks.weight.shape, ranks.weight.double(), 1e-5)
    wanted, wanted_scale = scaled(norm.numpy())
    for y, scale, total in found:
        assert torch.equal(total, ranks.total)
        assert torch.equal(y.view(torch.uint8), found[0][0].view(torch.uint8))
        torch.testing.assert_close(
            scale.double(), torch.from_numpy(wanted_scale), rtol=1e-5, atol=0
        )
        assert (y.double().numpy() == wanted).mean() > 0.99
