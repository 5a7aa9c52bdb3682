"""Tensor types: element type, global shape, and placement over the mesh axes `tp` and `kvp`.

    f32[T, 4096@tp]        dim 1 is sharded over tp
    f32[T, 4096@tp_kvp]    ... over all tp × kvp ranks of a stage: over tp, and each piece over kvp
    f32[T, 4096]+sum(tp)   each tp rank holds a partial sum
    f32[T, 32, 128]+lse(kvp)   each KVP group holds a partial attention result (needs its lse to merge)
    f32[T/2, 32, 128]+sent(kvp)   the same, of half of the rows, on its way to the peers until it is merged

Shapes are global; `local_shape` gives what one rank holds. Sizes T, R and KV are counted per KVP
group already (see `sizes`), so sharding KV over kvp does not divide it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from .sizes import Size

AXES = ("tp", "kvp")
PRODUCT = "tp_kvp"
"""Both axes as one, tp outermost: rank (group, tp_rank) is number tp_rank·kvp + group along it."""

E4M3 = "f8e4m3"
ITEMSIZE = {"f32": 4, "bf16": 2, "f16": 2, E4M3: 1, "i64": 8}
DTYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
TORCH_NAMES = {short: long for long, short in DTYPE_NAMES.items()} | {
    E4M3: "float8_e4m3fn",
    "i64": "int64",
}


def degree(axis: str, mesh: Mapping[str, int]) -> int:
    """How many ranks an axis has, of the mesh or their product."""
    return math.prod(mesh[name] for name in axis.split("_"))


@dataclass(frozen=True)
class Partial:
    """A value that is complete only after a reduction ("sum", "lse" or, on its way, "sent") over `axis`."""

    kind: str
    axis: str


@dataclass(frozen=True)
class TensorType:
    """dtype, global shape, per dim the axis that it is sharded over (or None), and partiality."""

    dtype: str
    shape: tuple[Size, ...]
    axes: tuple[str | None, ...]
    partial: Partial | None = None

    def __str__(self) -> str:
        dims = (f"{s}@{a}" if a else str(s) for s, a in zip(self.shape, self.axes, strict=True))
        suffix = f"+{self.partial.kind}({self.partial.axis})" if self.partial else ""
        return f"{self.dtype}[{', '.join(dims)}]{suffix}"

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def local_shape(self, mesh: Mapping[str, int]) -> tuple[Size, ...]:
        """The shape of one rank's piece. Symbolic sizes are per group already."""
        return tuple(
            size // degree(axis, mesh) if axis and isinstance(size, int) else size
            for size, axis in zip(self.shape, self.axes, strict=True)
        )

    def local_elements(self, mesh: Mapping[str, int]) -> Size:
        shape = self.local_shape(mesh)
        number = math.prod(size for size in shape if isinstance(size, int))
        rest = [size for size in shape if not isinstance(size, int)]
        return number * sympy.Mul(*rest) if rest else number

    def local_bytes(self, mesh: Mapping[str, int]) -> Size:
        return self.itemsize * self.local_elements(mesh)


def tensor(dtype: str, *shape: Size) -> TensorType:
    """A replicated tensor."""
    return TensorType(dtype, shape, (None,) * len(shape))
