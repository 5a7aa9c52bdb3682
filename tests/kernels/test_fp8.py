"""Rows and caches of 8-bit floats, as the GPU's kernels make them, against the reference of the IR."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mnemoc.ir.ops.dense import norm, silu
from mnemoc.ir.ops.e4m3 import LARGEST, nearest, scaled

pytestmark = pytest.mark.usefixtures("as_on_gpu")
WIDTHS = (96, 3584)  # one tile, mostly empty; 14 tiles of float32, and 7 of bfloat16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=WIDTHS)
def fp8(request: pytest.FixtureRequest, spec: Any) -> Any:
    return spec("cuda:sm_90", heads=(1, 1), sizes=(request.param, request.param), fp8=True)


def rows(*shape: int) -> torch.Tensor:
    """Rows of all sizes, the last of them zero: its scale must not be."""
    return torch.randn(*shape) * torch.tensor([1e-3, 1.0, 300.0, 0.0])[:, None]


def check(found: tuple[torch.Tensor, torch.Tensor], exact: Any) -> None:
    """The reference's scales and values; another neighbour only of what float32 cannot tell from a tie."""
    values, scale = (x.double().numpy() for x in found)
    wanted, wanted_scale = scaled(exact)
    np.testing.assert_allclose(scale, wanted_scale, rtol=1e-5)
    error = np.abs(exact / wanted_scale) * 3e-5  # of statistics, products and the scale
    low, high = (nearest(exact / wanted_scale + sign * error) for sign in (-1, 1))
    assert ((low <= values) & (values <= high)).all()
    assert (values == wanted).mean() > 0.99
    assert (np.abs(values[:3]).max(axis=1) == LARGEST).all()


@torch.inference_mode()
def test_norms(fp8: Any, load: Any) -> None:
    module = load(fp8, "rms_norm")
    x, residual, weight = rows(4, fp8.hidden), rows(4, fp8.hidden), torch.randn(fp8.hidden)
    check(module.rms_norm_fp8(x, weight), norm(x.double().numpy(), weight.double().numpy(), 1e-5))
    y, scale, total = module.add_rms_norm_fp8(x, residual, weight)
    assert torch.equal(total, x + residual)
    check((y, scale), norm(total.double().numpy(), weight.double().numpy(), 1e-5))


@torch.inference_mode()
def test_swiglu_of_a_whole_row(fp8: Any, load: Any) -> None:
    gate, up = torch.randn(4, fp8.ffn) * 4, rows(4, fp8.ffn)
    found = load(fp8, "swiglu_fp8").swiglu_fp8(torch.cat((gate, up), dim=1))
    check(found, silu(gate.double().numpy()) * up.double().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_rows_of_attention(dtype: str, spec: Any, load: Any) -> None:
    a_spec = spec("cuda:sm_90", heads=(28, 4), head_dim=128, fp8=True, dtype=dtype)
    x = rows(4, 28 * 128).to(getattr(torch, dtype))
    check(load(a_spec, "quantize").quantize_fp8(x), x.double().numpy())


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.inference_mode()
def test_keys_and_values_are_stored_as_the_nearest_and_none_beyond_the_largest(
    qk_norm: bool, spec: Any, load: Any
) -> None:
    a_spec = spec("cuda:sm_90", heads=(6, 2), qk_norm=qk_norm, kv_dtype="float8_e4m3fn")
    plain = spec("cuda:sm_90", heads=(6, 2), qk_norm=qk_norm)
    d, slots = a_spec.head_dim, torch.tensor([33, -1, 2, 47])
    qkv, angle = torch.randn(4, 10 * d) * 200, torch.randn(4, d // 2)
    rot = torch.stack((angle.cos(), angle.sin()), dim=1)
    norms = (torch.rand(d) + 0.5, torch.rand(d) * 600) if qk_norm else ()
    given = {}
    for name, a in (("fp8", a_spec), ("plain", plain)):
        dtype = getattr(torch, a.kv_dtype)
        caches = tuple(torch.zeros(2, 3, 16, d, dtype=dtype) for _ in range(2))
        q = load(a, "rope_append").rope_append(qkv, rot, *caches, slots, *norms)
        given[name] = q, *(cache.double() for cache in caches)
    assert torch.equal(given["fp8"][0], given["plain"][0])
    for stored, exact in zip(given["fp8"][1:], given["plain"][1:], strict=True):
        assert exact.abs().max() > LARGEST
        assert torch.equal(stored, torch.from_numpy(nearest(exact.numpy())))


@torch.inference_mode()
def test_the_product_of_the_vendor_keeps_its_contract() -> None:
    """What the programs call: rows and channels scaled, the second operand column-major, few rows, a bias."""
    x, w = torch.randn(3, 64), torch.randn(32, 64)
    bias = torch.randn(32).bfloat16()
    (x8, x_scale), (w8, w_scale) = (scaled(t.numpy()) for t in (x, w))
    x8, w8 = (torch.from_numpy(t).to(torch.float8_e4m3fn) for t in (x8, w8))
    x_scale, w_scale = torch.from_numpy(x_scale), torch.from_numpy(w_scale)
    y = torch._scaled_mm(
        x8, w8.t(), x_scale, w_scale.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    exact = F.linear(x8.double() * x_scale, w8.double() * w_scale, bias.double())
    torch.testing.assert_close(y.double(), exact, atol=0.05, rtol=0.01)
