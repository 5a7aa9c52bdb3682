"""Ahead-of-time compilation, with no GPU: what each kernel uses of each architecture, and how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mnemoc.codegen import aot
from mnemoc.codegen.aot import REPORT, Part, compile_kernels, compile_parts
from mnemoc.codegen.kernels import KernelSpec, _triton, render_kernels
from mnemoc.errors import MnemocError
from mnemoc.ir.model import load_model, presets

TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
FP8 = "float8_e4m3fn"
WHOLE = (4, 128)  # Llama 3 8B's and Qwen3 8B's heads: with the kernels that plan and merge
NODE = 8  # devices among which heads are cut
OTHERS = {  # heads, head dim, page size, dtype: what no preset needs, and pages too small for bulk copies
    "small pages": ((7, 1), 128, 16, "bfloat16"),
    "head dim 64": ((8, 1), 64, 128, "float16"),
    "head dim 32, small pages": ((2, 1), 32, 16, "bfloat16"),
    "float32": ((8, 1), 128, 64, "float32"),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def sources_of(a_spec: Any, *modules: str) -> dict[str, str]:
    rendered = render_kernels(a_spec)
    return {f"kernels/{name}.py": rendered[f"kernels/{name}.py"] for name in ("__init__", *modules)}


def report(files: dict[str, bytes]) -> dict[str, Mapping[str, Any]]:
    kernels = json.loads(files[REPORT])["kernels"]
    assert {kernel["file"] for kernel in kernels} == files.keys() - {REPORT}
    assert all(files[kernel["file"]].startswith(b"\x7fELF") for kernel in kernels)
    return {Path(kernel["file"]).stem: kernel for kernel in kernels}


def check(kernels: dict[str, Mapping[str, Any]], spec: KernelSpec) -> None:
    """No spills; both products in their loops, on the units meant; wide loads; as many programs as meant."""
    values, arch = _triton(spec, None), spec.target.removeprefix("cuda:")
    for name, kernel in kernels.items():
        assert kernel["spill_bytes"] == 0, (name, kernel)
        assert 0 < kernel["registers"] <= 255
        kind = name.rpartition("/")[2].removeprefix("attention_")
        if kind not in ("prefill", "decode"):
            continue
        tile = values[kind]
        assert kernel["programs_per_sm"] >= tile["programs"], (name, kernel)
        assert kernel["loads"]["bulk" if tile["bulk"] else "16"] >= 2 * 2, (
            name,
            kernel,
        )  # K, V; 2 loops
        if spec.dtype == "float32":
            continue
        unit = PRODUCTS[arch] if kind == "prefill" else "HMMA"
        steps = (spec.head_dim + tile["block_n"]) // 16  # 16 deep: of scores, and of outputs
        assert kernel["products"].keys() == {unit}, (name, kernel)
        assert kernel["products"][unit] >= 2 * steps, (name, kernel)
        if kind == "prefill":
            assert kernel["tensor_core"] == TENSOR_CORE[arch]


def preset_shapes() -> dict[tuple[int, int, int], str]:
    """Query heads, KV heads and head dim of a rank, of every preset at tp = 1 and the largest of a node."""
    shapes = {}
    for name in presets():
        model = load_model(name)
        tp = max(t for t in range(1, NODE + 1) if model.num_heads % t == NODE % t == 0)
        for degree in (1, tp):
            kv_heads = max(1, model.num_kv_heads // degree)
            shapes[model.num_heads // degree, kv_heads, model.head_dim] = f"{name}, tp={degree}"
    return shapes


@pytest.mark.slow
def test_every_kernel_of_qwen3_8b_and_llama_3_8b_compiles_without_spills(
    spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plan has them compiled; the other architectures' are compiled below, and in `test_aot_rows`."""
    a_spec = spec(
        "cuda:sm_90",
        heads=(32, 8),
        head_dim=128,
        page_size=64,
        dtype="bfloat16",
        qk_norm=True,  # which is what sets the two models apart; the others below have none
        sizes=(4096, 14336),
    )
    said: list[str] = []
    files = compile_kernels(a_spec, render_kernels(a_spec), said.append)
    kernels = report(files)
    assert len(kernels) == 12
    check(kernels, a_spec)
    assert said[-1] == "compiled 12 of 12 kernels for sm_90"
    monkeypatch.setattr(aot, "_compile", None)  # from here on only the cache can answer
    assert compile_kernels(a_spec, render_kernels(a_spec), said.append) == files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kv_dtype"),
    [("sm_80", ""), ("sm_90", ""), ("sm_90", FP8), ("sm_100", ""), ("sm_100", FP8)],
)
def test_attention_of_every_preset_compiles_as_intended(
    arch: str, kv_dtype: str, spec: Any
) -> None:
    specs = {
        label: spec(
            f"cuda:{arch}",
            heads=(heads, kv_heads),
            head_dim=head_dim,
            page_size=64,
            dtype="bfloat16",
            kv_dtype=kv_dtype,
        )
        for (heads, kv_heads, head_dim), label in preset_shapes().items()
    }
    compile_attention(specs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TENSOR_CORE)
def test_attention_beside_the_presets_compiles_as_intended(arch: str, spec: Any) -> None:
    specs = {
        label: spec(f"cuda:{arch}", heads=heads, head_dim=d, page_size=page, dtype=dtype)
        for label, (heads, d, page, dtype) in OTHERS.items()
    }
    compile_attention(specs)


def compile_attention(specs: dict[str, KernelSpec]) -> None:
    """Prefill and decode of all specs, in one go. Decode's texts with equally many query heads to a KV head
    depend on how many of those there are by one constant: those with one are enough.
    """
    parts = []
    for a_spec in specs.values():
        decode = ["attention_decode"] if a_spec.num_kv_heads == 1 else []
        namesakes = (a_spec.num_heads // a_spec.num_kv_heads, a_spec.head_dim) != WHOLE
        parts.append(
            Part(a_spec, render_kernels(a_spec), [*decode, "attention_prefill"], namesakes)
        )
    for (label, a_spec), kernels in zip(specs.items(), compile_parts(parts), strict=True):
        assert kernels
        check({f"{label}/{Path(k.report['file']).stem}": k.report for k in kernels}, a_spec)


def test_the_same_sources_give_the_same_bytes_and_load_no_compiler_here(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_spec = spec("cuda:sm_90", dtype="bfloat16")
    sources = sources_of(a_spec, "merge")
    once = compile_kernels(a_spec, sources)
    assert once.keys() == {f"kernels/sm_90/{name}.cubin" for name in ("merge", "pack")} | {REPORT}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.chdir(tmp_path)
    assert compile_kernels(a_spec, sources) == once
    assert "triton" not in vars(aot)


def test_a_damaged_cache_entry_is_made_anew(spec: Any, tmp_path: Path) -> None:
    a_spec = spec("cuda:sm_90", dtype="bfloat16")
    sources = sources_of(a_spec, "swiglu")
    once = compile_kernels(a_spec, sources)
    (entry,) = tmp_path.rglob("*.zip")
    entry.write_bytes(entry.read_bytes()[:-40])
    assert compile_kernels(a_spec, sources) == once


def test_a_kernel_that_does_not_compile_is_named(spec: Any) -> None:
    a_spec = spec("cuda:sm_90", dtype="bfloat16")
    sources = sources_of(a_spec, "swiglu")
    sources["kernels/swiglu.py"] = sources["kernels/swiglu.py"].replace("tl.sigmoid", "tl.sigmoit")
    with pytest.raises(MnemocError, match=r"swiglu\.cubin: Triton could not compile.*sigmoit"):
        compile_kernels(a_spec, sources)


def test_a_compiler_that_dies_is_an_error(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "worker.py"
    dying.write_text("import sys\nsys.exit('no room')\n")
    monkeypatch.setattr(aot, "WORKER", dying)
    a_spec = spec("cuda:sm_90", dtype="bfloat16")
    with pytest.raises(MnemocError, match="no room"):
        compile_kernels(a_spec, render_kernels(a_spec))


def test_without_triton_a_cuda_plan_says_what_it_needs(
    spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    a_spec = spec("cuda:sm_90", dtype="bfloat16")
    with pytest.raises(MnemocError, match="install triton"):
        compile_kernels(a_spec, {})
