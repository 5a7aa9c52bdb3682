"""The row-wise kernels and the merge of one rank: calls of each on random data, their bytes, their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import reference, work
from .device import Run
from .kernels import PAGE, kernel_spec
from .runner import Setup
from .sizes import Row

ELEMENT = 2  # bytes, bfloat16 or float16

Call = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Work:
    """One kernel at one size. bytes: of one call; make: a call on data of its own."""

    name: str
    bytes: int
    make: Callable[[], Run]


class RowKernels:
    """RMS norm, add + RMS norm, SwiGLU, and RoPE with the append to the cache."""

    def __init__(self, setup: Setup, shape: Row) -> None:
        self.setup, self.shape = setup, shape
        self.device = setup.device.torch
        self.spec = kernel_spec(
            setup.device.target,
            shape.heads,
            setup.device.dtype,
            hidden=shape.hidden,
            ffn=shape.ffn,
            qk_norm=shape.qk_norm,
        )
        load = setup.kernels.load
        self.norms, self.swiglu = load(self.spec, "rms_norm"), load(self.spec, "swiglu")
        self.rope = load(self.spec, "rope_append")

    def works(self, rows: int) -> list[Work]:
        hidden, ffn, heads = self.shape.hidden, self.shape.ffn, self.shape.heads

        def norm() -> Run:
            x, weight = self._randn(rows, hidden), self._randn(hidden)
            return lambda: self.norms.rms_norm(x, weight)

        def add_norm() -> Run:
            x, residual, weight = (
                self._randn(*s) for s in ((rows, hidden), (rows, hidden), (hidden,))
            )
            return lambda: self.norms.add_rms_norm(x, residual, weight)

        def swiglu() -> Run:
            gate_up = self._randn(rows, 2 * ffn)
            return lambda: self.swiglu.swiglu(gate_up)

        def rope() -> Run:
            arguments = self._rope(rows)
            return lambda: self.rope.rope_append(*arguments)

        return [
            Work("rope_append", work.rope_append_bytes(rows, heads, ELEMENT, ELEMENT), rope),
            Work("rms_norm", work.rms_norm_bytes(rows, hidden, ELEMENT), norm),
            Work("add_rms_norm", work.add_rms_norm_bytes(rows, hidden, ELEMENT), add_norm),
            Work("swiglu", work.swiglu_bytes(rows, ffn, ELEMENT), swiglu),
        ]

    def errors(self, rows: int) -> Iterator[tuple[str, float]]:
        """Relative errors by kernel."""
        eps = self.spec.norm_eps
        x, residual = self._randn(rows, self.shape.hidden), self._randn(rows, self.shape.hidden)
        weight = self._randn(self.shape.hidden)
        found = self._poisoned(lambda: (self.norms.rms_norm(x, weight),))
        yield "rms_norm", reference.relative_error(found[0], reference.rms_norm(x, weight, eps))
        y, total = self._poisoned(lambda: self.norms.add_rms_norm(x, residual, weight))
        yield "add_rms_norm, sum", reference.relative_error(total, x.double() + residual.double())
        expected = reference.rms_norm(total, weight, eps)
        yield "add_rms_norm", reference.relative_error(y, expected)
        gate_up = self._randn(rows, 2 * self.shape.ffn)
        found = self._poisoned(lambda: (self.swiglu.swiglu(gate_up),))
        yield "swiglu", reference.relative_error(found[0], reference.swiglu(gate_up))
        yield from self._rope_errors(rows)

    def _rope_errors(self, rows: int) -> Iterator[tuple[str, float]]:
        heads, eps = self.shape.heads, self.spec.norm_eps
        qkv, rot, k_cache, v_cache, slots, *norms = self._rope(rows)
        slots[:: max(2, rows // 3)] = (
            -1 if rows > 1 else slots[0]
        )  # rows of which others hold the keys
        before = k_cache.clone(), v_cache.clone()
        (q,) = self._poisoned(
            lambda: (self.rope.rope_append(qkv, rot, k_cache, v_cache, slots, *norms),)
        )
        split = qkv.view(rows, -1, heads.dim).split((heads.query, heads.kv, heads.kv), dim=1)
        turned = [x.double() for x in split[:2]]
        if norms:
            turned = [reference.rms_norm(x, w, eps) for x, w in zip(split, norms, strict=False)]
        q_expected, k_expected = (reference.rotated(x, rot) for x in turned)
        yield "rope_append, q", reference.relative_error(q, q_expected)
        held, at = slots >= 0, slots[slots >= 0]
        for name, cache, was, expected in (
            ("k", k_cache, before[0], k_expected),
            ("v", v_cache, before[1], split[2]),
        ):
            flat, flat_was = cache.flatten(1, 2), was.flatten(1, 2)
            yield (
                f"rope_append, {name}",
                reference.relative_error(flat[:, at].transpose(0, 1), expected[held]),
            )
            flat_was[:, at] = flat[:, at]
            assert torch.equal(flat, flat_was), "rope_append wrote where it was not to"

    def _rope(self, rows: int) -> list[torch.Tensor]:
        """qkv, rot, caches, slots and, where there are any, the weights of QK-norm."""
        heads = self.shape.heads
        angle = torch.rand(rows, heads.dim // 2, device=self.device) * 6.3
        pages = -(-rows // PAGE) + 1
        caches = [self._randn(heads.kv, pages, PAGE, heads.dim) for _ in range(2)]
        slots = torch.randperm(pages * PAGE, device=self.device)[:rows]
        norms = [self._randn(heads.dim) for _ in range(2)] if self.shape.qk_norm else []
        qkv = self._randn(rows, (heads.query + 2 * heads.kv) * heads.dim)
        return [qkv, torch.stack((angle.cos(), angle.sin()), 1), *caches, slots, *norms]

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.setup.device.dtype, device=self.device)

    def _poisoned(self, call: Call) -> tuple[torch.Tensor, ...]:
        """The results of a call whose allocations held NaN: a first call's memory, poisoned and freed."""
        for result in call():
            result.fill_(torch.nan)
        del result
        return call()


class Merge:
    """Packing partial results for KVP peers, and merging what they sent."""

    def __init__(self, setup: Setup, shape: Row) -> None:
        self.setup, self.heads, self.device = setup, shape.heads, setup.device.torch
        spec = kernel_spec(
            setup.device.target, shape.heads, setup.device.dtype, hidden=shape.hidden, ffn=shape.ffn
        )
        self.module = setup.kernels.load(spec, "merge")

    def works(self, rows: int) -> list[Work]:
        heads = self.heads

        def pack() -> Run:
            out, lse = self._partial(rows)
            every = torch.arange(rows, device=self.device)
            return lambda: self.module.pack(out, lse, every)

        def merge() -> Run:
            out, lse = self._partial(rows)
            every = torch.arange(rows, device=self.device)
            theirs = self.module.pack(*self._partial(rows), every)
            return lambda: self.module.merge(out, lse, theirs, every)

        return [
            Work("pack", work.pack_bytes(rows, heads, ELEMENT), pack),
            Work("merge", work.merge_bytes(rows, 1, heads, ELEMENT), merge),
        ]

    def errors(self, rows: int) -> Iterator[tuple[str, float]]:
        """Of a merge with one peer's partial results, on half of the rows, some of which saw nothing."""
        out, lse = self._partial(rows + 2)
        other_out, other_lse = self._partial(rows + 2)
        for empty_out, empty_lse in ((out, lse), (other_out, other_lse)):
            empty_out[:1], empty_lse[:1] = 0, -torch.inf
        chosen = torch.randperm(rows + 2, device=self.device)[: rows // 2 + 1]
        before = out.clone(), lse.clone()
        packed = self.module.pack(other_out, other_lse, chosen)
        sent = torch.cat((other_out.float(), other_lse[..., None]), dim=2)[chosen]
        assert torch.equal(packed, sent), "pack changed what it packed"
        self.module.merge(out, lse, packed, chosen)
        outs, lses = torch.stack((before[0], other_out)), torch.stack((before[1], other_lse))
        expected, lse_expected = reference.merged(outs[:, chosen], lses[:, chosen])
        yield "merge", reference.relative_error(out[chosen], expected)
        seen = lse_expected > -torch.inf
        assert torch.equal(lse[chosen] > -torch.inf, seen), "merge lost or invented keys"
        error = reference.relative_error(lse[chosen][seen], lse_expected[seen])
        yield "merge, lse", error
        others = torch.ones(rows + 2, dtype=torch.bool, device=self.device)
        others[chosen] = False
        assert torch.equal(out[others], before[0][others]), "merge changed rows that are not shared"

    def _partial(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, self.heads.query, self.heads.dim)
        out = torch.randn(shape, dtype=self.setup.device.dtype, device=self.device)
        return out, torch.randn(shape[:2], device=self.device) * 3
