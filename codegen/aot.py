"""Compiles the Triton kernels of an artifact to cubins, with no GPU, and reports what they use.

The compiler runs in processes of its own (`aot_worker`), some kernels in each, so that planning loads
neither Triton nor torch. What was compiled once is kept in the user's cache, under a digest of everything
that the result depends on: the same sources give the same bytes either way.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import MnemocError
from .kernels import FLOAT8, KernelSpec

Progress = Callable[[str], None]
Job = dict[str, object]

WORKER = Path(__file__).with_name("aot_worker.py")
REPORT = "kernels/resources.json"

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", FLOAT8: "fp8e4nv"}
ARGUMENTS: Mapping[str, str] = {
    # What the kernels' arguments are, by name; `*` alone: a tensor of the plan's dtype; `*kv`: of that of
    # its cache; `cache`: one of these, or a descriptor of its blocks. Others: i32.
    **dict.fromkeys(("qkv", "q", "q_norm", "k_norm", "out"), "*"),
    **dict.fromkeys(("k_cache", "v_cache"), "*kv"),
    **dict.fromkeys(("y8",), "*fp8e4nv"),
    **dict.fromkeys(("x", "residual", "total", "weight", "gate_up", "y"), "*"),
    **dict.fromkeys(("packed",), "*"),
    **dict.fromkeys(("rot", "lse", "packed_lse", "parts", "part_lses", "scale"), "*fp32"),
    **dict.fromkeys(("slots", "peer_rows", "addresses"), "*i64"),
    **dict.fromkeys(("rows", "kv_len", "past", "pages", "plan", "ends", "table"), "*i32"),
    **dict.fromkeys(("k", "v"), "cache"),
}


def compile_kernels(
    spec: KernelSpec, sources: Mapping[str, str], progress: Progress = lambda message: None
) -> dict[str, bytes]:
    """The cubins of all kernels, "kernels/sm_90/….cubin", and "kernels/resources.json" about them."""
    arch = spec.target.removeprefix("cuda:")
    jobs = [job for path in sorted(sources) for job in _jobs(path, sources[path], arch, spec)]
    request = {"arch": arch, "sources": dict(sources), "jobs": jobs}
    version = _triton_version()
    known = json.dumps([request, version, WORKER.read_text()], sort_keys=True)
    cached = _cache_folder() / f"{hashlib.sha256(known.encode()).hexdigest()}.zip"
    files = _read(cached)
    if files is None:
        files = _files(request, jobs, version, progress)
        _write(cached, files)
    return files


def _files(
    request: Mapping[str, object], jobs: Sequence[Job], version: str, progress: Progress
) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="mnemoc-aot-") as folder:
        answers = _compile(request, jobs, Path(folder), progress)
        files = {answer["file"]: (Path(folder) / answer["file"]).read_bytes() for answer in answers}
    report = {"arch": request["arch"], "triton": version, "kernels": answers}
    files[REPORT] = (json.dumps(report, indent=1, sort_keys=True) + "\n").encode()
    return files


@dataclass(frozen=True)
class Part:
    """Some kernels of one spec. sources: as `render_kernels` gives them; modules: whose kernels are wanted,
    all of them or only the one that has the module's name.
    """

    spec: KernelSpec
    sources: Mapping[str, str]
    modules: Sequence[str]
    namesakes: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the report says of a kernel, and its machine code as text."""

    report: Mapping[str, Any]
    sass: str


def compile_parts(parts: Sequence[Part]) -> list[list[Compiled]]:
    """The kernels of several specs of one architecture, in one go, for loading the compiler takes long.

    The same text is compiled once, with the first part that has it. The user's cache is not asked.
    """
    arch = parts[0].spec.target.removeprefix("cuda:")
    sources: dict[str, str] = {}
    jobs: list[Job] = []
    seen: set[str] = set()
    for number, part in enumerate(parts):
        for path, text in part.sources.items():
            own = path.replace("kernels/", f"part{number}/", 1)
            sources[own] = text
            name = Path(path).stem
            if name not in part.modules or text in seen:
                continue
            seen.add(text)
            for job in _jobs(own, text, arch, part.spec):
                if not part.namesakes or job["kernel"] == f"{name}_kernel":
                    jobs.append({**job, "file": f"{number}/{Path(str(job['file'])).name}"})
    found: list[list[Compiled]] = [[] for _ in parts]
    with tempfile.TemporaryDirectory(prefix="mnemoc-aot-") as folder:
        request = {"arch": arch, "sources": sources, "jobs": jobs}
        for answer in _compile(request, jobs, Path(folder), lambda message: None):
            listing = (Path(folder) / answer["file"]).with_suffix(".sass").read_text()
            found[int(Path(answer["file"]).parent.name)].append(Compiled(answer, listing))
    return found


# ---------------------------------------------------------------------------------------- the jobs


def _jobs(path: str, source: str, arch: str, spec: KernelSpec) -> Iterator[Job]:
    """One job for each kernel of a module, found in its text: functions whose names end in _kernel."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
            continue
        yield {
            "module": path.removesuffix(".py").replace("/", "."),
            "kernel": node.name,
            "file": f"kernels/{arch}/{node.name.removesuffix('_kernel')}.cubin",
            "signature": {argument.arg: _type(argument.arg, spec) for argument in node.args.args},
        }


def _type(argument: str, spec: KernelSpec) -> str:
    kind = ARGUMENTS.get(argument, "i32")
    if kind == "cache":
        return f"cache {TYPES[spec.kv_dtype]}"
    own = {"*": spec.dtype, "*kv": spec.kv_dtype}
    return f"*{TYPES[own[kind]]}" if kind in own else kind


# ------------------------------------------------------------------------------------- the compiler


def _compile(
    request: Mapping[str, object], jobs: Sequence[Job], folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Compile the jobs into a folder, in as many processes as there are processors; they alternate, big and
    small. What is said of each, in the order of their files.
    """
    workers = min(os.cpu_count() or 1, 8, len(jobs))
    answers: list[dict[str, Any]] = []
    one_at_a_time = Lock()

    def work(share: Sequence[Job]) -> None:
        for answer in _answers({**request, "jobs": share}, str(folder)):
            with one_at_a_time:
                answers.append(answer)
                progress(f"compiled {len(answers)} of {len(jobs)} kernels for {request['arch']}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, [jobs[first::workers] for first in range(workers)]))
    return sorted(answers, key=lambda answer: str(answer["file"]))


def _answers(request: Mapping[str, object], folder: str) -> Iterator[dict[str, Any]]:
    """What one worker says of each of its jobs, as it says it. Any failure is a MnemocError."""
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as complaints:
        json.dump(request, asked)
        asked.seek(0)
        command = [sys.executable, "-P", str(WORKER), folder]
        with subprocess.Popen(
            command,
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=_environment(folder),
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    process.kill()
                    raise _failed(answer["file"], answer["error"])
                yield answer
        if process.returncode != 0:
            complaints.seek(0)
            raise _failed("the compiler's process", complaints.read())


def _failed(where: str, why: str) -> MnemocError:
    """The last line that has words: below it there may be a caret."""
    lines = (line for line in reversed(why.splitlines()) if any(map(str.isalpha, line)))
    last = next(lines, "no reason given")
    return MnemocError(f"Triton could not compile the kernel: {last.strip()}", where=where)


def _environment(folder: str) -> dict[str, str]:
    """The user's, without what would change the compiler's output, or keep it from compiling."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k.endswith("_PATH")
    }
    own = {"TRITON_CACHE_DIR": f"{folder}/triton", "TRITON_DEFAULT_FP_FUSION": "1"}
    return {**kept, **own, "PYTHONHASHSEED": "0"}


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise MnemocError(
            "a cuda target needs Triton's compiler", do="install triton, or plan for the target cpu"
        ) from error


# ---------------------------------------------------------------------------------------- the cache


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mnemoc" / "aot"


def _read(cached: Path) -> dict[str, bytes] | None:
    """The files of an entry; None if there is none, or if its checksums do not hold."""
    try:
        with zipfile.ZipFile(cached) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return None


def _write(cached: Path, files: Mapping[str, bytes]) -> None:
    """Keep the files, aside first; a cache that cannot be written is done without."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    aside = cached.with_suffix(f".{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(packed.getvalue())
        aside.replace(cached)
    except OSError:
        aside.unlink(missing_ok=True)
