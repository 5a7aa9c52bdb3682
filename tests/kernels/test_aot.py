"""Ahead-of-time compilation, with no GPU: what each kernel uses of each architecture, and how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mnemoc.codegen import aot
from mnemoc.codegen.aot import REPORT, compile_kernels
from mnemoc.codegen.kernels import render_kernels
from mnemoc.errors import MnemocError

TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
HEADED = ("attention_prefill", "attention_decode", "splits", "rope_append")  # depend on the heads
MODELS = {  # one rank's share: heads, head dim, page size, dtype
    "llama-3-70b, tp=8": ((8, 1), 128, 64, "bfloat16"),
    "qwen2.5-7b": ((28, 4), 128, 16, "bfloat16"),
    "head dim 64": ((32, 8), 64, 16, "float16"),
    "head dim 32": ((8, 4), 32, 16, "bfloat16"),
    "float32": ((8, 2), 128, 64, "float32"),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def sources_of(a_spec: Any, *modules: str) -> dict[str, str]:
    rendered = render_kernels(a_spec)
    return {f"kernels/{name}.py": rendered[f"kernels/{name}.py"] for name in ("__init__", *modules)}


def report(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    kernels = json.loads(files[REPORT])["kernels"]
    assert {kernel["file"] for kernel in kernels} == files.keys() - {REPORT}
    assert all(files[kernel["file"]].startswith(b"\x7fELF") for kernel in kernels)
    return {Path(kernel["file"]).stem: kernel for kernel in kernels}


def check(kernels: dict[str, dict[str, Any]], arch: str) -> None:
    for name, kernel in kernels.items():
        assert kernel["spill_bytes"] == 0, (name, kernel)
        assert 0 < kernel["registers"] <= 255
        if name.startswith("attention_prefill"):
            assert kernel["tensor_core"] == TENSOR_CORE[arch]
        if name.startswith("attention_decode"):
            assert kernel["tensor_core"] == "mma.sync"


@pytest.mark.slow
@pytest.mark.parametrize("arch", TENSOR_CORE)
def test_every_kernel_of_qwen3_8b_and_llama_3_8b_compiles_without_spills(
    arch: str, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_spec = spec(
        f"cuda:{arch}",
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
    assert len(kernels) == 11
    check(kernels, arch)
    assert said[-1] == f"compiled 11 of 11 kernels for {arch}"
    monkeypatch.setattr(aot, "_compile", None)  # from here on only the cache can answer
    assert compile_kernels(a_spec, render_kernels(a_spec), said.append) == files


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arch", TENSOR_CORE)
def test_attention_of_other_models_compiles_without_spills(
    arch: str, model: str, spec: Any
) -> None:
    heads, head_dim, page_size, dtype = MODELS[model]
    a_spec = spec(f"cuda:{arch}", heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    kernels = report(compile_kernels(a_spec, sources_of(a_spec, *HEADED)))
    assert len(kernels) == 6
    check(kernels, arch if dtype != "float32" else "sm_80")


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
