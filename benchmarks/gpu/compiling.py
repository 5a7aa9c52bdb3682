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

import torch

from . import tiles
from .attending import Contest, ours
from .device import Run
from .kernels import FP8, PAGE, has_fp8
from .rowwise import Merge, RowKernels
from .runner import Case, Figures, Section, Setup, say
from .summing import Sums
from .work import Heads

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
    end = started + 1.5 * setup.sizes.budgets["compile"]
    note = None
    try:
        codes = [child.wait(timeout=max(0.1, end - time.monotonic())) for child in children]
        if any(codes):
            note = "some did not compile: see their sections"
    except subprocess.TimeoutExpired:
        note = "stopped: the sections compile the rest"
    finally:
        for child in children:
            child.kill()
    return [{"processes": count, "seconds": time.monotonic() - started, "note": note}]


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
    """Something that calls each kernel once; candidates for tiles last."""
    sizes = setup.sizes
    for heads in sizes.heads:
        for kv in (setup.device.dtype, *([FP8] if has_fp8(setup.device.target) else [])):
            for name, rows in (("attention_prefill", 32), ("attention_decode", 1)):
                yield _call(setup, name, heads, rows, kv)
    for shape in sizes.shapes:
        yield lambda shape=shape: list(RowKernels(setup, shape).errors(2))  # type: ignore[misc]
        yield lambda shape=shape: list(Merge(setup, shape).errors(2))  # type: ignore[misc]
        yield lambda shape=shape: list(Sums(setup, shape).errors(2))  # type: ignore[misc]
    searching = tiles.search(setup)
    for candidate in searching.candidates():
        yield lambda candidate=candidate: searching.run_once(candidate)  # type: ignore[misc]


def _call(setup: Setup, name: str, heads: Heads, rows: int, kv: torch.dtype) -> Run:
    given = Contest(name, heads, min(rows, PAGE), (PAGE,), 1 << 40, kv)

    def call() -> None:
        run, *_ = ours(setup, given)
        run()

    return call


SECTION = Section("compile", "Compiling every kernel, on several processors", cases)
