"""Compiles the kernels that the sections will ask for, in several processes at once, before any is timed.

Triton compiles at the first call and keeps what it made on disk; one process would spend minutes on that.
So children call each kernel once, on little data, and the sections find it there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from .attending import Contest, ours
from .device import Run
from .kernels import FP8, PAGE, has_fp8
from .rowwise import Merge, RowKernels
from .runner import Case, Figures, Section, Setup, say

MOST_CHILDREN = 8
SHARE = "--compile-share"


def cases(setup: Setup) -> Sequence[Case]:
    return [Case("all kernels", lambda: _compiled(setup))]


def _compiled(setup: Setup) -> list[Figures]:
    count = 1 if setup.device.rehearsal else max(1, min(MOST_CHILDREN, (os.cpu_count() or 2) // 2))
    words = [word for word in sys.argv[1:] if word not in ("--again", "--publish")]
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", *words, SHARE]
    children = [subprocess.Popen([*command, f"{i}/{count}"]) for i in range(count)]
    limit_s = 2 * setup.sizes.budgets["compile"]
    try:
        codes = [child.wait(timeout=limit_s) for child in children]
    finally:
        for child in children:
            child.kill()
    row: Figures = {"processes": count, "seconds": time.monotonic() - started}
    return [row] if not any(codes) else [row | {"note": "some did not compile: see their sections"}]


def compile_share(setup: Setup, share: str) -> int:
    """One child's part of the work, "i/n"; 1 if a kernel did not compile."""
    mine, count = (int(part) for part in share.split("/"))
    failed = 0
    for call in list(_calls(setup))[mine::count]:
        try:
            call()
            setup.device.synchronize()
        except Exception as error:  # the section that needs it tells
            say(f"does not compile: {type(error).__name__}: {error}".splitlines()[0])
            failed = 1
    return failed


def _calls(setup: Setup) -> Iterator[Run]:
    """Something that calls each kernel once, the slowest to compile first."""
    sizes = setup.sizes
    for heads in sizes.heads:
        for kv in (setup.device.dtype, *([FP8] if has_fp8(setup.device.target) else [])):
            for name, rows in (("attention_prefill", 32), ("attention_decode", 1)):
                given = Contest(name, heads, rows, (PAGE,), 1 << 40, kv)
                yield lambda given=given: ours(setup, given)[0]()  # type: ignore[misc]
    for shape in sizes.shapes:
        yield lambda shape=shape: list(RowKernels(setup, shape).errors(2))  # type: ignore[misc]
        yield lambda shape=shape: list(Merge(setup, shape).errors(2))  # type: ignore[misc]


SECTION = Section("compile", "Compiling every kernel, on several processors", cases)
