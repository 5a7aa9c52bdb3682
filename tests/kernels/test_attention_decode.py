"""The decode kernel of the CPU, compiled and by torch alone, on all that its specialisation depends on."""

from __future__ import annotations

import ctypes
import mmap
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from mnemoc.codegen.kernels import render_kernels
from mnemoc.runtime.loader import ArtifactModules

SHAPES = [  # query heads on each KV head, KV heads, head dim, page size
    (1, 2, 64, 64),
    (1, 1, 128, 16),
    (3, 2, 64, 16),
    (3, 1, 20, 64),
    (4, 2, 32, 64),
    (4, 1, 128, 64),
    (7, 1, 80, 64),
    (7, 2, 16, 16),
    (8, 1, 64, 16),
    (8, 2, 128, 64),
    (16, 1, 64, 64),
    (20, 2, 16, 48),
]
NARROWER = {"AVX": "cc -mno-avx512f", "SSE": "cc -mno-avx"}  # what is explicit outweighs `native`
PROT_NONE = 0
EVERY_TAIL = [0, *range(1, 36), 63, 64, 65, 127, 128, 129, 150]


def decode(module: ModuleType, path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    assert module.COMPILED is not None
    if path == "torch":
        monkeypatch.setattr(module, "COMPILED", None)
    return module


def make(shape: tuple[int, int, int, int], kit: Any) -> Any:
    group, kv_heads, head_dim, page_size = shape
    heads = (group * kv_heads, kv_heads)
    return kit.spec("cpu", heads=heads, head_dim=head_dim, page_size=page_size)


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_equals_the_reference_at_every_length(
    shape: tuple[int, int, int, int], path: str, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_spec = make(shape, kit)
    module = decode(kit.load(a_spec, "attention_decode"), path, monkeypatch)
    case = kit.case(a_spec, [(1, length, length - 1) for length in EVERY_TAIL])
    kit.check(case, case.run(module, "attention_decode"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other vectors have one width only")
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6], SHAPES[9], SHAPES[10]], ids=str)
@pytest.mark.parametrize("vectors", NARROWER)
def test_narrower_vectors_give_the_same(
    vectors: str, shape: Any, kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", NARROWER[vectors])
    a_spec = make(shape, kit)
    contents = {path: text.encode() for path, text in render_kernels(a_spec).items()}
    module = ArtifactModules(tmp_path, contents, ("kernels/",)).load("kernels.attention_decode")
    case = kit.case(a_spec, [(1, length, length - 1) for length in EVERY_TAIL])
    kit.check(case, case.run(decode(module, "compiled", monkeypatch), "attention_decode"))


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_any_batch_equals_the_reference(
    path: str, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_spec = make((3, 2, 64, 16), kit)
    module = decode(kit.load(a_spec, "attention_decode"), path, monkeypatch)
    shards = st.tuples(st.just(1), st.integers(0, 200), st.integers(-3, 220))

    @settings(max_examples=40)
    @given(st.lists(shards, min_size=1, max_size=5), st.floats(-4, 4))
    def holds(cases: list[tuple[int, int, int]], scale: float) -> None:
        case = kit.case(a_spec, cases)
        case.q *= scale
        kit.check(case, case.run(module, "attention_decode"))

    holds()


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("group", [1, 8])
def test_extreme_scores_stay_finite_and_right(
    group: int, path: str, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_spec = make((group, 2, 64, 64), kit)
    module = decode(kit.load(a_spec, "attention_decode"), path, monkeypatch)
    case = kit.case(a_spec, [(1, length, length - 1) for length in (150, 150, 65, 1)])
    pages = case.segments.pages.long()
    case.q[:] = 80.0
    case.k[:, pages[0]] = torch.linspace(-15, 15, 192).view(3, 64, 1)  # scores to ±1e4, one ahead
    case.k[:, pages[1]] = 15.0  # all equal, and large
    case.k[:, pages[2]] = -15.0
    case.k[:, pages[2, 1], 0] = 15.0  # the last one alone
    out, lse = case.run(module, "attention_decode")
    kit.check(case, (out, lse))
    assert lse[0].min() > 4e3 and lse.isfinite().all() and out.isfinite().all()
    last = case.v[:, pages[2, 1], 0].repeat_interleave(group, 0)
    torch.testing.assert_close(out[2], last)


def test_what_is_no_number_is_not_hidden(kit: Any) -> None:
    a_spec = make((4, 2, 32, 64), kit)
    module = kit.load(a_spec, "attention_decode")
    case = kit.case(a_spec, [(1, 70, 69), (1, 70, 69)])
    case.k[:, case.segments.pages[1, 0], 3] = torch.nan
    out, lse = case.run(module, "attention_decode")
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    assert out[1].isnan().all() and lse[1].isnan().all()


class Guarded:
    """A copy of a tensor, directly before memory that cannot be read. Its first `length` tokens only."""

    def __init__(self, tensor: torch.Tensor, length: int) -> None:
        self.shape = tensor.shape
        seen = tensor.flatten(0, 2)[:length].contiguous()
        size = seen.numel() * 4
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, room + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, PROT_NONE) == 0
        self.address = start + room - size
        ctypes.memmove(self.address, seen.data_ptr(), size)

    def data_ptr(self) -> int:
        return self.address


@pytest.mark.skipif(platform.system() != "Linux", reason="the guard is set by mprotect")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[5]], ids=str)
def test_nothing_is_read_beyond_the_last_token(shape: Any, kit: Any) -> None:
    a_spec = make(shape, kit)
    module = kit.load(a_spec, "attention_decode")
    for length in (1, 5, 15, 64, 65, 128):
        case = kit.case(a_spec, [(1, length, length - 1)])
        whole = case.k, case.v
        case.k, case.v = (Guarded(cache, length) for cache in whole)
        found = case.run(module, "attention_decode")
        case.k, case.v = whole
        kit.check(case, found)
