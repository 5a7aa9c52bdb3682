"""Every kernel against float64, on data that is drawn anew each time, into memory that held NaN.

‖out − ref‖ / ‖ref‖ of bfloat16 results lies between 1e-3 and 1e-2, for that is their rounding; a wrong page,
mask, split or weight is far above. Segments are of all kinds: causal, over a full shard, from a late one,
empty, one row, longer than many splits; pages lie scattered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from . import reference
from .kernels import FP8, Cache, attention, has_fp8, kernel_spec, segments, type_name
from .rowwise import Merge, RowKernels
from .runner import Case, Figures, Section, Setup
from .sizes import Row
from .summing import Sums
from .work import Heads

LIMIT = 1e-2
"""Of the relative error of outputs in bfloat16."""
FP8_LIMIT = 4e-2
"""Of rows that are stored as e4m3, whose rounding is 2.6e-2 of a value in the mean."""
FP8_LIMIT_INTERPRETED = 0.3
"""The same in Triton's interpreter, which loses what rounding carries: up to half of a value."""
LSE_LIMIT = 2e-3
"""Of the absolute error of log-sum-exps, which are float32 from bfloat16 products."""


def cases(setup: Setup) -> Sequence[Case]:
    return list(_cases(setup))


def _cases(setup: Setup) -> Iterator[Case]:
    sizes = setup.sizes
    kv_types = [setup.device.dtype, *([FP8] if has_fp8(setup.device.target) else [])]
    for tokens in sizes.tokens:
        for heads in sizes.heads:
            first = tokens == sizes.tokens[0] and heads == sizes.heads[0]
            for page in sizes.pages if first else sizes.pages[:1]:
                for kv in kv_types if page == sizes.pages[0] else kv_types[:1]:
                    key = f"{heads.name}, {tokens} tokens, pages of {page}, KV {type_name(kv)}"
                    yield Case(f"attention of {key}", _bind(setup, heads, tokens, page, kv))
    for shape in sizes.shapes:
        for count in sizes.counts[:3]:
            yield Case(
                f"row-wise kernels of {shape.heads.name}, {count} rows",
                lambda shape=shape, count=count: _rowwise(setup, shape, count),  # type: ignore[misc]
            )


def _bind(setup: Setup, heads: Heads, tokens: int, page: int, kv: torch.dtype):  # type: ignore[no-untyped-def]
    return lambda: [
        _attention(setup, name, heads, tokens, page, kv)
        for name in ("attention_prefill", "attention_decode")
    ]


def _lengths(name: str, tokens: int) -> list[tuple[int, int, int]]:
    """(rows, kv_len, past) of segments around `tokens` keys, of all kinds, in random order."""
    c = 1 if name == "attention_decode" else max(2, min(300, tokens // 6))
    found = [
        (c, tokens, tokens - c),  # causal, behind a past
        (c, tokens, tokens + c),  # a full shard of others' keys
        (c, c, 0),  # no past
        (c, tokens // 3, -(c // 2) if c > 1 else tokens // 3),  # from a later row on
        (c, 0, 0),  # nothing to see
        (1, tokens // 2 + 1, tokens // 2),
        (c, min(tokens, 17), tokens),
        (1, 1, 0),
    ]
    random.shuffle(found)
    return found


def _attention(
    setup: Setup, name: str, heads: Heads, tokens: int, page: int, kv: torch.dtype
) -> Figures:
    device = setup.device
    kinds = _lengths(name, tokens)
    each = -(-tokens // page)
    tables = torch.randperm(each * len(kinds)).view(len(kinds), each)
    cache = _cache(setup, heads, kinds, tables, page, kv)
    given = segments(device, kinds, tables)
    rows = sum(rows for rows, _, _ in kinds)
    q = torch.randn(rows, heads.query, heads.dim, dtype=device.dtype, device=device.place)
    out = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:2], torch.nan, device=device.place)
    spec = kernel_spec(device.target, heads, device.dtype, kv_dtype=kv, page=page)
    run, _, _ = attention(setup.kernels.load(spec, name), name, cache, given, q, out, lse)
    run()
    device.synchronize()
    expected, lse_expected = reference.attention(q, cache.k, cache.v, given)
    unseen = lse_expected == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen), (
        f"{name}: −inf where keys are seen, or the reverse"
    )
    lse_error = (lse.double() - lse_expected)[~unseen].abs().max().item()
    return _verdict(setup, name, reference.relative_error(out, expected), lse_error)


def _cache(
    setup: Setup,
    heads: Heads,
    kinds: Sequence[tuple[int, int, int]],
    tables: torch.Tensor,
    page: int,
    kv: torch.dtype,
) -> Cache:
    """Random where tokens are; what was never written is NaN, and must not be read into a result."""
    shape = (heads.kv, tables.numel(), page, heads.dim)
    k, v = (torch.randn(shape, device=setup.device.place) for _ in range(2))
    for pages, (_, kv_len, _) in zip(tables.tolist(), kinds, strict=True):
        whole, rest = divmod(kv_len, page)
        for cache in (k, v):
            if rest:
                cache[:, pages[whole], rest:] = torch.nan
            unused = pages[whole + bool(rest) :]
            cache[:, unused] = torch.nan
    return Cache(k.to(kv), v.to(kv))


def _rowwise(setup: Setup, shape: Row, count: int) -> list[Figures]:
    """Errors of each row-wise kernel, of `count` rows of one rank of a model."""
    kinds = RowKernels(setup, shape), Merge(setup, shape), Sums(setup, shape)
    found = [error for kind in kinds for error in kind.errors(count)]
    if has_fp8(setup.device.target):
        found += RowKernels(setup, shape, FP8).rope_errors(count)
    return [_verdict(setup, name, error) for name, error in found]


def _verdict(setup: Setup, name: str, error: float, lse_error: float | None = None) -> Figures:
    limit = LIMIT
    if "fp8" in name:
        limit = FP8_LIMIT_INTERPRETED if setup.device.rehearsal else FP8_LIMIT
    fine = error < limit and (lse_error is None or lse_error < LSE_LIMIT)
    row: Figures = {"kernel": name, "relative_error": error, "lse_error": lse_error}
    return row if fine else row | {"error": f"{name}: relative error {error:.2e}, lse {lse_error}"}


SECTION = Section("correctness", "Every kernel against float64", cases)
