"""Norms, rotary embedding and append, SwiGLU and merge of both targets against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
CLOSE = {"atol": 3e-6, "rtol": 3e-6}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@torch.inference_mode()
def test_rms_norm_alone_and_after_an_add(target: str, spec: Any, load: Any) -> None:
    module = load(spec(target), "rms_norm")
    x, residual, weight = torch.randn(5, 96), torch.randn(5, 96), torch.randn(96)
    expected = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(module.rms_norm(x, weight).double(), expected, **CLOSE)
    given = x.clone(), residual.clone()
    y, total = module.add_rms_norm(x, residual, weight)
    expected = F.rms_norm((x + residual).double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close((x, residual), given)


@torch.inference_mode()
def test_swiglu(target: str, spec: Any, load: Any) -> None:
    gate_up = torch.randn(5, 320) * 4
    gate, up = gate_up.double().chunk(2, dim=1)
    y = load(spec(target), "swiglu").swiglu(gate_up)
    torch.testing.assert_close(y.double(), F.silu(gate) * up, **CLOSE)


@pytest.mark.parametrize("factor", [1.0, 1.25])
@torch.inference_mode()
def test_rotary_takes_angles_in_float32(target: str, factor: float, spec: Any, load: Any) -> None:
    a_spec = spec(target, attention_factor=factor)
    pos = torch.tensor([0, 1, 77, 9_999_999])
    angle = pos.float()[:, None] * torch.tensor(a_spec.inv_freq)
    expected = torch.stack((angle.cos(), angle.sin()), dim=1) * factor
    assert torch.equal(load(a_spec, "rotary").rotary(pos), expected)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.inference_mode()
def test_rope_turns_and_appends_where_a_slot_is_given(
    target: str, qk_norm: bool, spec: Any, load: Any
) -> None:
    a_spec = spec(target, heads=(6, 2), qk_norm=qk_norm)
    module, d = load(a_spec, "rope_append"), a_spec.head_dim
    qkv, angle = torch.randn(4, 10 * d), torch.randn(4, d // 2)
    rot = torch.stack((angle.cos(), angle.sin()), dim=1)
    norms = (torch.rand(d) + 0.5, torch.rand(d) + 0.5) if qk_norm else ()
    slots = torch.tensor([33, -1, 2, 47])
    k_cache, v_cache = torch.zeros(2, 3, 16, d), torch.zeros(2, 3, 16, d)
    q = module.rope_append(qkv, rot, k_cache, v_cache, slots, *norms)

    heads = qkv.double().view(4, 10, d)
    turned = [heads[:, :6], heads[:, 6:8]]
    if qk_norm:
        turned = [F.rms_norm(x, (d,), w.double(), 1e-5) for x, w in zip(turned, norms, strict=True)]
    q_expected, k_expected = (_rotated(x, angle.double()) for x in turned)
    k_all, v_all = (cache.flatten(1, 2).transpose(0, 1).double() for cache in (k_cache, v_cache))
    torch.testing.assert_close(q.double(), q_expected, **CLOSE)
    stored = [0, 2, 3]
    torch.testing.assert_close(k_all[slots[stored]], k_expected[stored], **CLOSE)
    torch.testing.assert_close(v_all[slots[stored]], heads[stored, 8:], **CLOSE)
    untouched = torch.ones(48, dtype=torch.bool).index_fill_(0, slots[stored], False)
    assert not k_all[untouched].any()
    assert not v_all[untouched].any()


def _rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """As the models' reference says it: x·cos + rotate_half(x)·sin, the angles twice."""
    cos, sin = (f(angle).repeat(1, 2).unsqueeze(1) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, dim=2)
    return x * cos + torch.cat((-b, a), dim=2) * sin


@pytest.mark.parametrize("peers", [1, 3])
def test_merge_weighs_by_log_sum_exp_and_stands_what_saw_nothing(
    target: str, peers: int, spec: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(spec(target, peers=peers), "merge")
    check_merge(module, peers)
    if target == "cpu":
        assert module.COMPILED is not None
        monkeypatch.setattr(module, "COMPILED", None)  # as where there is no compiler
        check_merge(module, peers)


@torch.inference_mode()
def check_merge(module: ModuleType, peers: int) -> None:
    """A group's share of the heads, 8 of 24, each peer with parts of some rows, out of order."""
    whole, lses = torch.randn(6, 24, 64), torch.randn(6, 24) * 3
    out, lse = whole[:, 8:16], lses[:, 8:16]
    out[1:3], lse[1:3] = 0, -torch.inf
    before = whole.clone(), lses.clone()
    parts = [(out.double(), lse.double())]
    table, received = torch.full((6, peers), -1, dtype=torch.int32), []
    for peer in range(peers):
        other_out, other_lse = torch.randn(6, 8, 64), torch.randn(6, 8) * 3
        other_out[2:4], other_lse[2:4] = 0, -torch.inf
        rows = torch.tensor([[5, 1, 2, 3], [3, 1], [2, 5, 3]][peer])
        packed = module.pack(other_out, other_lse, rows)
        assert torch.equal(packed[..., :64], other_out[rows])
        assert torch.equal(packed[..., 64], other_lse[rows])
        first = sum(map(len, received))
        table[rows, peer] = torch.arange(first, first + len(rows), dtype=torch.int32)
        received.append(packed)
        unseen = torch.ones(6, dtype=torch.bool).index_fill_(0, rows, False)
        other_lse[unseen] = -torch.inf
        parts.append((other_out.double(), other_lse.double()))
    module.merge(out, lse, torch.cat(received), table)

    outs, seen = (torch.stack(both) for both in zip(*parts, strict=True))
    weight = seen.softmax(0).nan_to_num(0).unsqueeze(3)
    torch.testing.assert_close(out.double(), (outs * weight).sum(0), **CLOSE)
    torch.testing.assert_close(lse.double(), seen.logsumexp(0), **CLOSE)
    assert lse[2].eq(-torch.inf).all()
    assert not out[2].any()
    whole[:, 8:16][[1, 2, 3, 5]] = before[0][:, 8:16][[1, 2, 3, 5]]
    lses[:, 8:16][[1, 2, 3, 5]] = before[1][:, 8:16][[1, 2, 3, 5]]
    assert torch.equal(whole, before[0]), "rows and heads that nobody sent are left alone"
    assert torch.equal(lses, before[1])
