"""Compiles Triton kernels to cubins: a program of its own, which `aot` starts, so that a plan need not
load Triton. Imports nothing of mnemoc, needs no GPU, and never loads torch.

stdin: {"arch": "sm_90", "sources": {path: text}, "jobs": [{"module", "kernel", "file", "signature"}]}
stdout: one line of JSON a job: {"file", "registers", "spill_bytes", …}, or {"file", "error"}
argv: the folder that receives the cubins, under the jobs' file names, and their machine code as text (.sass)
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import linecache
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
PRODUCTS = r"\b(UTC[HQ]MMA|[HQ]GMMA|HMMA|QMMA)\b"
"""Matrix products in SASS: of sm_100's tensor memory, of warp groups, and of single warps."""

LOADS = {"bulk": r"UTMALDG", "16": r"LDG(STS)?\S*\.128\b", "8": r"LDG(STS)?\S*\.64\b"}
"""Loads from device memory in SASS: blocks by the copy engine; bytes of a thread's load (or async copy)."""

SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
"""Bytes of shared memory of a multiprocessor; each program on it takes RESERVED more than its own."""
RESERVED = 1024
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor, on all three


class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the sources importable, relative imports and all, under the paths of the artifact."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        file = name.replace(".", "/")
        for candidate in (f"{file}.py", f"{file}/__init__.py"):
            if candidate in self.sources:
                is_package = candidate.endswith("__init__.py")
                return importlib.machinery.ModuleSpec(
                    name, self, origin=candidate, is_package=is_package
                )
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None and spec.origin is not None
        source = self.sources[spec.origin]
        lines = source.splitlines(keepends=True)  # where Triton finds the text of a function
        linecache.cache[spec.origin] = (len(source), None, lines, spec.origin)
        exec(compile(source, spec.origin, "exec", dont_inherit=True), module.__dict__)


def compile_job(job: Mapping[str, Any], arch: str, folder: Path) -> dict[str, Any]:
    """Compile one kernel into its file; returns what it uses of the device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(job["module"])
    kernel = getattr(module, job["kernel"])
    signature = {name: _argument(kind, module) for name, kind in job["signature"].items()}
    # As at run time: torch aligns its allocations, so that loads may be wide and asynchronous.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(kernel.params)
        if signature[parameter.name].startswith("*")
        and not parameter.do_not_specialize_on_alignment
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, {}, aligned),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options=_options(job["kernel"], module),
    )
    path = folder / job["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compiled.asm["cubin"])
    registers, stack = _usage(path)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    ptx, sass = compiled.asm["ptx"], _sass(path)
    path.with_suffix(".sass").write_text(sass)
    return {
        "file": job["file"],
        "module": job["module"],
        "entry": compiled.metadata.name,
        "warps": warps,
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": shared,
        "programs_per_sm": _occupancy(arch, warps, registers, shared),
        "tensor_core": next((name for name in TENSOR_CORE if name in ptx), None),
        "products": dict(Counter(re.findall(PRODUCTS, sass))),
        "loads": {name: len(re.findall(load, sass)) for name, load in LOADS.items()},
    }


def _options(kernel: str, module: ModuleType) -> Any:
    """A kernel's own of a module with several (MERGE_OPTIONS of merge_…_kernel), or the module's."""
    return getattr(module, f"{kernel.partition('_')[0].upper()}_OPTIONS", module.OPTIONS)


def _occupancy(arch: str, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at a time. A thread's registers come in eights."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, SHARED[arch] // (shared + RESERVED), WARPS // warps, PROGRAMS)


def _argument(kind: str, module: ModuleType) -> str:
    """A type as Triton writes it; "cache bf16" is a tensor, or a descriptor where its blocks come in bulk."""
    if not kind.startswith("cache "):
        return kind
    element = kind.removeprefix("cache ")
    if not module.BULK.value:
        return f"*{element}"
    return f"tensordesc<{element}[{module.BLOCK_N.value}, {module.HEAD_DIM.value}]>"


def _usage(cubin: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a thread. Spilled registers live on the stack, nothing else does."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _sass(cubin: Path) -> str:
    """Machine code as text. Where its branches lead is left out, which takes longest to find."""
    from triton import knobs

    command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    request = json.load(sys.stdin)
    sys.meta_path.insert(0, Sources(request["sources"]))
    folder = Path(sys.argv[1])
    for job in request["jobs"]:
        try:
            answer = compile_job(job, request["arch"], folder)
        except Exception as error:  # whatever the compiler raises becomes an answer
            reason: BaseException = error
            while reason.__cause__ is not None:  # of one in a function that the kernel calls
                reason = reason.__cause__
            answer = {"file": job["file"], "error": f"{type(reason).__name__}: {reason}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
