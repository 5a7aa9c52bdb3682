"""The row-wise kernels of all shipped models, compiled with no GPU: 16 bytes an access, and no spills."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mnemoc.codegen import aot
from mnemoc.codegen.aot import REPORT
from mnemoc.codegen.kernels import FLOAT8, KernelSpec, render_kernels
from mnemoc.ir.model import load_model

ARCHES = ("sm_80", "sm_90", "sm_100")
MODULES = ("merge", "quantize", "rms_norm", "rope_append", "swiglu", "swiglu_fp8")
NEEDED = ("__init__", "rows", "swiglu")  # by others of them
MODELS = {  # with the degrees of tensor parallelism: those whose rows have shapes of their own
    "llama-3-8b": (1,),
    "llama-3-70b": (8,),
    "llama-3.1-405b": (8,),
    "qwen2.5-7b": (4,),
    "qwen3-8b": (1,),
    "qwen3-32b": (8,),
}
NARROW = {  # what else is loaded and stored, one value a head or row: places, log-sum-exps, scales
    "rope_append": {"LDG 64"},
    "pack": {"LDG 64", "LDG 32", "STG 32"},
    "merge": {"LDG 32", "STG 32"},
}
FP8_STORES = {"STG 64", "STG 32"}  # half of what was loaded; and the scale


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


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
    )


def check(specs: Sequence[KernelSpec], folder: Path) -> list[dict[str, int]]:
    """Compile what goes over rows, each text once and all in one go, and look at each kernel's machine code.

    Returns each spec's wide loads by kernel, of the texts that came first with it.
    """
    arch = specs[0].target.removeprefix("cuda:")
    sources: dict[str, str] = {}
    jobs: list[aot.Job] = []
    seen: set[str] = set()
    for number, spec in enumerate(specs):
        rendered = render_kernels(spec)
        for name in {*MODULES, *NEEDED}:
            text = rendered.get(f"kernels/{name}.py")
            if text is None:
                continue
            path = f"spec{number}/{name}.py"
            sources[path] = text
            if name in MODULES and text not in seen:
                for job in aot._jobs(path, text, arch, spec):
                    jobs.append({**job, "file": f"{number}/{Path(str(job['file'])).name}"})
            seen.add(text)
    request = {"arch": arch, "sources": sources, "jobs": jobs}
    files = aot._compile(request, jobs, "", lambda message: None)
    loads: list[dict[str, int]] = [{} for _ in specs]
    kernels = json.loads(files.pop(REPORT))["kernels"]
    paths = [folder / str(kernel["file"]).replace("/", "_") for kernel in kernels]
    for kernel, path in zip(kernels, paths, strict=True):
        path.write_bytes(files[kernel["file"]])
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(accesses, paths))
    for kernel, code in zip(kernels, codes, strict=True):
        number, name = int(Path(kernel["file"]).parent.name), Path(kernel["file"]).stem
        assert kernel["spill_bytes"] == 0, kernel
        loads[number][name] = wide_loads(name, code, specs[number])
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


def accesses(cubin: Path) -> list[str]:
    """Global loads and stores with their bits, and barriers, in the order of the machine code."""
    from triton import knobs

    command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for match in re.finditer(r"\b(?:(LDG|STG)\.E([.\w]*)|(BAR)\.)", code):
        access, how, barrier = match.groups()
        bits = re.search(r"\.(128|64|U16|S16|U8|S8)\b", how or "")
        found.append(barrier or f"{access} {bits[1] if bits else 32}")
    return found


def test_rows_of_qwen2_5_7b_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Its hidden size, 7 · 512, is no power of two: the last quarter of the second tile is idle."""
    (loads,) = check([spec_of("qwen2.5-7b", 1, "sm_90", fp8=True)], tmp_path)
    assert loads["rms_norm"] == 2 * 2, "a row and its weights, two tiles"
    assert loads["add_rms_norm"] == 3 * 2
    assert (loads["swiglu"], loads["pack"], loads["merge"]) == (4, 1, 1 + 3)
    assert loads["rope_append"] == 2 + 4, "both halves of a head, and their cosines and sines"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_rows_of_every_model_move_16_bytes_at_a_time(arch: str, tmp_path: Path) -> None:
    shapes = [(model, tp) for model, degrees in MODELS.items() for tp in degrees]
    fp8 = (
        arch != "sm_80"
    )  # whose modules hold the plain kernels too, but for an append to a 16-bit cache
    specs = [spec_of(model, tp, arch, fp8=fp8) for model, tp in shapes]
    specs.append(spec_of("qwen3-8b", 1, arch, fp8=False))
    for loads in check(specs, tmp_path):
        assert all(count >= 2 for name, count in loads.items() if name != "pack"), loads
