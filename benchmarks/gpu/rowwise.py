"""The row-wise kernels and the merge of one rank: calls of each on random data, their bytes, their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import reference, work
from .device import Run
from .kernels import FP8, PAGE, has_fp8, kernel_spec
from .runner import Setup
from .sizes import Row

PEERS = 2  # of a KVP group, whose parts are merged
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

    def __init__(self, setup: Setup, shape: Row, kv: torch.dtype | None = None) -> None:
        """kv: of the cache that RoPE appends to, where it is not that of all."""
        self.setup, self.shape, self.kv = setup, shape, kv or setup.device.dtype
        self.device = setup.device.place
        self.spec = kernel_spec(
            setup.device.target,
            shape.heads,
            setup.device.dtype,
            hidden=shape.hidden,
            ffn=shape.ffn,
            qk_norm=shape.qk_norm,
            kv_dtype=self.kv,
            fp8=has_fp8(setup.device.target),
        )
        load = setup.kernels.load
        self.norms, self.swiglu = load(self.spec, "rms_norm"), load(self.spec, "swiglu")
        self.rope = load(self.spec, "rope_append")
        if self.spec.fp8:
            self.quantize_fp8 = load(self.spec, "quantize").quantize_fp8
            self.swiglu_fp8 = load(self.spec, "swiglu_fp8").swiglu_fp8

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
            *(self._fp8_works(rows) if self.spec.fp8 else ()),
        ]

    def _fp8_works(self, rows: int) -> list[Work]:
        """The kernels whose rows are stored as e4m3."""
        hidden, ffn, columns = self.shape.hidden, self.shape.ffn, self._columns

        def add_norm() -> Run:
            x, residual, weight = (
                self._randn(rows, hidden),
                self._randn(rows, hidden),
                self._randn(hidden),
            )
            return lambda: self.norms.add_rms_norm_fp8(x, residual, weight)

        def swiglu() -> Run:
            gate_up = self._randn(rows, 2 * ffn)
            return lambda: self.swiglu_fp8(gate_up)

        def quantize() -> Run:
            x = self._randn(rows, columns)
            return lambda: self.quantize_fp8(x)

        read_and_summed = 3 * rows * hidden * ELEMENT + hidden * ELEMENT
        return [
            Work(
                "add_rms_norm_fp8", read_and_summed + work.quantised_bytes(rows, hidden), add_norm
            ),
            Work("swiglu_fp8", 2 * rows * ffn * ELEMENT + work.quantised_bytes(rows, ffn), swiglu),
            Work(
                "quantize_fp8",
                rows * columns * ELEMENT + work.quantised_bytes(rows, columns),
                quantize,
            ),
        ]

    @property
    def _columns(self) -> int:
        """Of attention's output, which a kernel of its own quantises."""
        return self.shape.heads.query * self.shape.heads.dim

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
        yield from self.rope_errors(rows)
        if self.spec.fp8:
            yield from self._fp8_errors(rows)

    def _fp8_errors(self, rows: int) -> Iterator[tuple[str, float]]:
        """Of what e4m3 rows and their scales stand for."""
        eps, hidden = self.spec.norm_eps, self.shape.hidden
        x, residual, weight = (
            self._randn(rows, hidden),
            self._randn(rows, hidden),
            self._randn(hidden),
        )
        norm = reference.rms_norm(x, weight, eps)
        yield "rms_norm_fp8", _quantised_error(self.norms.rms_norm_fp8(x, weight), norm)
        y, scale, total = self.norms.add_rms_norm_fp8(x, residual, weight)
        norm = reference.rms_norm(total, weight, eps)
        yield "add_rms_norm_fp8", _quantised_error((y, scale), norm)
        gate_up = self._randn(rows, 2 * self.shape.ffn)
        expected = reference.swiglu(gate_up)
        yield "swiglu_fp8", _quantised_error(self.swiglu_fp8(gate_up), expected)
        x = self._randn(rows, self._columns)
        yield "quantize_fp8", _quantised_error(self.quantize_fp8(x), x)

    def rope_errors(self, rows: int) -> Iterator[tuple[str, float]]:
        """The same of RoPE and the append alone."""
        name = "rope_append_fp8" if self.kv == FP8 else "rope_append"
        heads, eps = self.shape.heads, self.spec.norm_eps
        qkv, rot, k_cache, v_cache, slots, *norms = self._rope(rows)
        if rows > 1:
            slots[:: max(2, rows // 3)] = -1  # rows of which others hold the keys
        before = k_cache.float(), v_cache.float()
        (q,) = self._poisoned(
            lambda: (self.rope.rope_append(qkv, rot, k_cache, v_cache, slots, *norms),)
        )
        split = torch.split(qkv.view(rows, -1, heads.dim), [heads.query, heads.kv, heads.kv], dim=1)
        turned = [x.double() for x in split[:2]]
        if norms:
            turned = [reference.rms_norm(x, w, eps) for x, w in zip(split, norms, strict=False)]
        q_expected, k_expected = (reference.rotated(x, rot) for x in turned)
        yield f"{name}, q", reference.relative_error(q, q_expected)
        held, at = slots >= 0, slots[slots >= 0]
        for part, cache, was, expected in (
            ("k", k_cache, before[0], k_expected),
            ("v", v_cache, before[1], split[2]),
        ):
            flat, flat_was = cache.float().flatten(1, 2), was.flatten(1, 2)
            yield (
                f"{name}, {part}",
                reference.relative_error(flat[:, at].transpose(0, 1), expected[held]),
            )
            flat_was[:, at] = flat[:, at]
            assert torch.equal(flat, flat_was), "rope_append wrote where it was not to"

    def _rope(self, rows: int) -> list[torch.Tensor]:
        """qkv, rot, caches, slots and, where there are any, the weights of QK-norm."""
        heads = self.shape.heads
        angle = torch.rand(rows, heads.dim // 2, device=self.device) * 6.3
        pages = -(-rows // PAGE) + 1
        size = (heads.kv, pages, PAGE, heads.dim)
        caches = [self._randn(*size).to(self.kv) for _ in range(2)]
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


def _quantised_error(found: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> float:
    y, scale = found
    return reference.relative_error(y.double() * scale.double(), expected)


class Merge:
    """Packing partial results for KVP peers, all at once, and merging what all of them sent."""

    def __init__(self, setup: Setup, shape: Row) -> None:
        self.setup, self.heads, self.device = setup, shape.heads, setup.device.place
        spec = kernel_spec(
            setup.device.target,
            shape.heads,
            setup.device.dtype,
            hidden=shape.hidden,
            ffn=shape.ffn,
            peers=PEERS,
        )
        self.module = setup.kernels.load(spec, "merge")

    def works(self, rows: int) -> list[Work]:
        """Every row is shared with every peer."""
        heads = self.heads
        every = torch.arange(rows, device=self.device).repeat(PEERS)
        table = self._table(torch.arange(rows * PEERS).view(PEERS, rows).t())

        def pack() -> Run:
            out, lse = self._partial(rows)
            return lambda: self.module.pack(out, lse, every)

        def merge() -> Run:
            out, lse = self._partial(rows)
            theirs = self.module.pack(*self._partial(rows), every)
            return lambda: self.module.merge(out, lse, theirs, table)

        return [
            Work("pack", work.pack_bytes(PEERS * rows, heads, ELEMENT), pack),
            Work("merge", work.merge_bytes(rows, PEERS, heads, ELEMENT), merge),
        ]

    def errors(self, rows: int) -> Iterator[tuple[str, float]]:
        """Of a merge with peers that each sent parts of some rows; some parts saw nothing."""
        rows += 2
        mine, others = self._partial(rows), [self._partial(rows) for _ in range(PEERS)]
        for out, lse in (mine, *others):
            out[:1], lse[:1] = 0, -torch.inf
        chosen = [torch.randperm(rows)[: rows // 2 + 1] for _ in others]
        places = torch.full((rows, PEERS), -1)
        packed, first = [], 0
        for peer, (part, sent) in enumerate(zip(others, chosen, strict=True)):
            packed.append(self.module.pack(*part, sent.to(self.device)))
            places[sent, peer] = torch.arange(first, first + len(sent))
            first += len(sent)
            assert torch.equal(packed[-1][..., : self.heads.dim], part[0][sent.to(self.device)])
        given = torch.zeros(PEERS, rows, dtype=torch.bool, device=self.device)
        for peer, sent in enumerate(chosen):
            given[peer, sent.to(self.device)] = True
        yield "pack", 0.0  # compared bit by bit above
        out, lse = mine[0].clone(), mine[1].clone()
        self.module.merge(out, lse, torch.cat(packed), self._table(places))
        outs = torch.stack([mine[0], *(part[0] for part in others)])
        lses = torch.stack([mine[1], *(part[1] for part in others)])
        lses[1:][~given] = -torch.inf
        expected, lse_expected = reference.merged(outs, lses)
        yield "merge", reference.relative_error(out, expected)
        seen = lse_expected > -torch.inf
        assert torch.equal(lse > -torch.inf, seen), "merge lost or invented keys"
        yield "merge, lse", reference.relative_error(lse[seen], lse_expected[seen])
        alone = ~given.any(0)
        assert torch.equal(out[alone], mine[0][alone]), "merge changed rows that are not shared"

    def _table(self, places: torch.Tensor) -> torch.Tensor:
        return places.to(self.device, torch.int32).contiguous()

    def _partial(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, self.heads.query, self.heads.dim)
        out = torch.randn(shape, dtype=self.setup.device.dtype, device=self.device)
        return out, torch.randn(shape[:2], device=self.device) * 3
