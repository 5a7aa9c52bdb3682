"""The row-wise kernels of all shipped models, compiled with no GPU: 16 bytes an access, and no spills."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mnemoc.codegen.aot import Part, compile_parts
from mnemoc.codegen.kernels import FLOAT8, KernelSpec, render_kernels
from mnemoc.ir.model import load_model

ARCHES = ("sm_80", "sm_90", "sm_100")
MODULES = ("all_reduce", "merge", "quantize", "rms_norm", "rope_append", "swiglu", "swiglu_fp8")
MODELS = {  # with the degrees of tensor parallelism: those whose rows have shapes of their own
    "llama-3-8b": (1,),
    "llama-3-70b": (8,),
    "llama-3.1-405b": (8,),
    "qwen2.5-7b": (4,),
    "qwen3-8b": (1,),
    "qwen3-32b": (8,),
}
NARROW = {  # what else is loaded and stored, one value a head, row or rank: places, log-sum-exps, scales
    "rope_append": {"LDG 64"},
    "pack": {"LDG 64", "LDG 32", "STG 32"},
    "merge": {"LDG 32", "STG 32"},
    "all_reduce_add": {"LDG 64"},
    "all_reduce_add_rms_norm": {"LDG 64"},
    "all_reduce_add_rms_norm_fp8": {"LDG 64"},
}
FP8_STORES = {"STG 64", "STG 32"}  # half of what was loaded; and the scale


def spec_of(name: str, tp: int, arch: str, *, fp8: bool) -> KernelSpec:
    model = load_model(name)
    return KernelSpec(
        target=f"cuda:{arch}",
        dtype="bfloat16",
        hidden=model.hidden,
        num_heads=model.num_heads // tp,
        num_kv_heads=max(1, model.num_kv_heads // tp),
        merged_heads=model.num_heads // tp,
        head_dim=model.head_dim,
        ffn=model.ffn // tp,
        page_size=64,
        norm_eps=model.norm_eps,
        qk_norm=model.qk_norm,
        inv_freq=model.rope.inv_freq(model.head_dim),
        attention_factor=1.0,
        kv_dtype=FLOAT8 if fp8 else "",
        fp8=fp8,
        peers=3,
        sum_ranks=tp,
    )


def check(specs: Sequence[KernelSpec]) -> list[dict[str, int]]:
    """Compile what goes over rows, each text once and all in one go, and look at each kernel's machine code.

    Returns each spec's wide loads by kernel, of the texts that came first with it.
    """
    parts = []
    for spec in specs:
        rendered = render_kernels(spec)
        modules = [name for name in MODULES if f"kernels/{name}.py" in rendered]
        parts.append(Part(spec, rendered, modules))
    loads = []
    for spec, kernels in zip(specs, compile_parts(parts), strict=True):
        assert all(kernel.report["spill_bytes"] == 0 for kernel in kernels)
        named = {Path(kernel.report["file"]).stem: accesses(kernel.sass) for kernel in kernels}
        loads.append({name: wide_loads(name, code, spec) for name, code in named.items()})
    return loads


def wide_loads(name: str, code: list[str], spec: KernelSpec) -> int:
    """How many loads of 16 bytes a kernel has, if it has no others but those that it must."""
    found = Counter(code)
    narrow = NARROW.get(name, set())
    if name.endswith("fp8") or (spec.kv_dtype == FLOAT8 and name == "rope_append"):
        narrow = narrow | FP8_STORES
    assert {*found} - {"LDG 128", "STG 128", "BAR"} <= narrow, (name, found)
    assert found["STG 128"] or name.endswith("fp8"), (name, found)
    if "BAR" in found:  # all of a row is under way before any of it is waited for
        before = Counter(code[: code.index("BAR")])
        assert before["LDG 128"] == found["LDG 128"], (name, code)
    return found["LDG 128"]


def accesses(code: str) -> list[str]:
    """Global loads and stores with their bits, and barriers, in the order of the machine code."""
    found = []
    for match in re.finditer(r"\b(?:(LDG|STG)\.E([.\w]*)|(BAR)\.)", code):
        access, how, barrier = match.groups()
        bits = re.search(r"\.(128|64|U16|S16|U8|S8)\b", how or "")
        found.append(barrier or f"{access} {bits[1] if bits else 32}")
    return found


def test_rows_of_qwen2_5_7b_move_16_bytes_at_a_time() -> None:
    """Its hidden size, 7 · 512, is no power of two: the last quarter of the second tile is idle."""
    (loads,) = check([replace(spec_of("qwen2.5-7b", 1, "sm_90", fp8=True), sum_ranks=4)])
    assert loads["rms_norm"] == 2 * 2, "a row and its weights, two tiles"
    assert loads["add_rms_norm"] == 3 * 2
    assert loads["all_reduce_add"] == 4 + 1, "one of each of four ranks, and of the residual"
    assert loads["all_reduce_add_rms_norm"] == loads["all_reduce_add_rms_norm_fp8"] == 4 + 2
    assert (loads["swiglu"], loads["pack"], loads["merge"]) == (4, 1, 1 + 3)
    assert loads["rope_append"] == 2 + 4, "both halves of a head, and their cosines and sines"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_rows_of_every_model_move_16_bytes_at_a_time(arch: str) -> None:
    shapes = [(model, tp) for model, degrees in MODELS.items() for tp in degrees]
    fp8 = (
        arch != "sm_80"
    )  # whose modules hold the plain kernels too, but for an append to a 16-bit cache
    specs = [spec_of(model, tp, arch, fp8=fp8) for model, tp in shapes]
    specs.append(spec_of("qwen3-8b", 1, arch, fp8=False))
    for loads in check(specs):
        assert all(count >= 2 for name, count in loads.items() if name != "pack"), loads
