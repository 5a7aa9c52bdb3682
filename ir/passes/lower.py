"""Lower to kernels: every op is given the callable that serves it, as its `kernel` attribute.

`kernels.NAME` is a specialised kernel of the artifact, `torch` a call of the vendor's library through
torch, `dist` a collective, `none` a name for something that exists already (parameters, reshapes).
Emission then needs no choices of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ...errors import BadInput
from ..graph import Module, Op
from ..types import TensorType

KERNELS = {
    "param": "none",
    "cache": "none",
    "split_heads": "none",
    "merge_heads": "none",
    "embed": "torch",
    "linear": "torch",
    "add": "torch",
    "select": "torch",
    "cast": "torch",
    "rotary": "kernels.rotary",
    "rms_norm": "kernels.rms_norm",
    "add_rms_norm": "kernels.rms_norm",
    "rope_append": "kernels.rope_append",
    "attend": "kernels.attention",
    "swiglu": "kernels.swiglu",
    "linear_fp8": "torch",
    "quantize_fp8": "kernels.quantize",
    "rms_norm_fp8": "kernels.rms_norm",
    "add_rms_norm_fp8": "kernels.rms_norm",
    "swiglu_fp8": "kernels.swiglu_fp8",
    "halve": "none",
    "join": "torch",
    "exchange": "kernels.merge",
    "exchange_scatter": "kernels.merge",
    "merge": "kernels.merge",
    "merge_scatter": "kernels.merge",
    "all_reduce": "dist",
    "all_reduce_add": "kernels.all_reduce",
    "all_reduce_add_rms_norm": "kernels.all_reduce",
    "all_reduce_add_rms_norm_fp8": "kernels.all_reduce",
    "all_gather": "dist",
}


FP8_MULTIPLE = 16
"""What either size of a weight in 8-bit floats must be a multiple of: the vendor's kernels load 16 bytes."""

CPU_KERNELS = {**KERNELS, "linear": "kernels.linear"}
"""On a CPU the vendor's products of few rows are slow, so that products have a kernel too."""


def lower(module: Module, target: str) -> Module:
    """The module with a kernel for each op. Ops that only `fuse` can serve are our fault here.

    BadInput where a product of 8-bit floats is not what the vendor's library can do.
    """
    kernels = CPU_KERNELS if target == "cpu" else KERNELS

    def assign(op: Op) -> Op:
        assert op.name in kernels, f"no kernel serves {op.name}: was the module fused?"
        return dataclasses.replace(op, attrs={**op.attrs, "kernel": kernels[op.name]})

    for function in module.functions.values():
        for op in function.ops:
            if op.name == "linear_fp8":
                _check_product(op, function.types[op.operands[2]], module.mesh)
    functions = {
        name: dataclasses.replace(function, ops=tuple(map(assign, function.ops)))
        for name, function in module.functions.items()
    }
    return dataclasses.replace(module, functions=functions)


def _check_product(op: Op, weight: TensorType, mesh: Mapping[str, int]) -> None:
    """BadInput if torch._scaled_mm, with scales of rows and channels, cannot do it on every device."""
    without = "plan without --quantization fp8"
    if (dtype := str(op.attrs["dtype"])) != "bf16":
        raise BadInput("products of fp8 come out as bf16 alone", got=dtype, do=without)
    rows, columns = weight.local_shape(mesh)
    assert isinstance(rows, int) and isinstance(columns, int)
    if rows % FP8_MULTIPLE or columns % FP8_MULTIPLE:
        raise BadInput(
            f"products of fp8 need sizes that are multiples of {FP8_MULTIPLE}",
            where=op.operands[2],
            got=f"{rows} × {columns} on each rank",
            do=f"{without}, or with less tensor parallelism",
        )
