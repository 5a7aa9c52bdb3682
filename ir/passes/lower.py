"""Lower to kernels: every op is given the callable that serves it, as its `kernel` attribute.

`kernels.NAME` is a specialised kernel of the artifact, `torch` a call of the vendor's library through
torch, `dist` a collective, `none` a name for something that exists already (parameters, reshapes).
Emission then needs no choices of its own.
"""

from __future__ import annotations

import dataclasses

from ..graph import Module, Op

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
    "merge": "kernels.merge",
    "merge_scatter": "kernels.merge",
    "all_reduce": "dist",
    "all_gather": "dist",
}


CPU_KERNELS = {**KERNELS, "linear": "kernels.linear"}
"""On a CPU the vendor's products of few rows are slow, so that products have a kernel too."""


def lower(module: Module, target: str) -> Module:
    """The module with a kernel for each op. Ops that only `fuse` can serve are our fault here."""
    kernels = CPU_KERNELS if target == "cpu" else KERNELS

    def assign(op: Op) -> Op:
        assert op.name in kernels, f"no kernel serves {op.name}: was the module fused?"
        return dataclasses.replace(op, attrs={**op.attrs, "kernel": kernels[op.name]})

    functions = {
        name: dataclasses.replace(function, ops=tuple(map(assign, function.ops)))
        for name, function in module.functions.items()
    }
    return dataclasses.replace(module, functions=functions)
