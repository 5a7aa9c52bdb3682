"""Compiling a kernel's C source: once for a machine, privately, and not at all where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mnemoc.codegen.kernels import render_kernels
from mnemoc.runtime.loader import ArtifactModules

SOURCE = b"int answer(void) { return 42; }\n"


@pytest.fixture
def native(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that compiles, with an empty cache of its own."""
    monkeypatch.setenv("MNEMOC_CACHE", str(tmp_path / "cache"))
    module: ModuleType = kit.load(kit.spec("cpu"), "native")
    return module


@pytest.fixture
def fresh(kit: Any, tmp_path: Path) -> Callable[[], ModuleType]:
    """`fresh()`: the decode kernel, loaded as by a new worker."""
    contents = {path: text.encode() for path, text in render_kernels(kit.spec("cpu")).items()}
    return lambda: ArtifactModules(tmp_path, contents, ("kernels/",)).load(
        "kernels.attention_decode"
    )


def entries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "native").iterdir())


def test_it_is_compiled_once_and_kept_for_its_user_alone(
    native: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert native.library("k", SOURCE).answer() == 42
    (made,) = entries(tmp_path)
    assert made.stat().st_mode & 0o777 == 0o600
    assert made.parent.stat().st_mode & 0o777 == 0o700
    before = made.stat().st_mtime_ns
    assert native.library("k", SOURCE).answer() == 42
    assert [entry.stat().st_mtime_ns for entry in entries(tmp_path)] == [before]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compiler", ["cc -DOTHER", "cc -mtune=generic"])
def test_another_source_or_command_is_another_library(
    compiler: str, native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.library("k", SOURCE)
    assert native.library("k", SOURCE.replace(b"42", b"43")).answer() == 43
    monkeypatch.setenv("CC", compiler)
    native.library("k", SOURCE)
    assert len(entries(tmp_path)) == 3


def test_workers_that_compile_at_once_leave_one_library(native: ModuleType, tmp_path: Path) -> None:
    program = (
        "import sys, types; native = types.ModuleType('native')\n"
        "exec(open(sys.argv[1]).read(), native.__dict__)\n"
        f"assert native.library('k', {SOURCE!r}).answer() == 42\n"
    )
    source = tmp_path / "native.py"
    source.write_text(native.__loader__.get_source(native.__name__))  # type: ignore[union-attr]
    command = [sys.executable, "-c", program, str(source)]
    workers = [subprocess.Popen(command) for _ in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    assert len(entries(tmp_path)) == 1


def test_a_damaged_library_is_made_anew(native: ModuleType, tmp_path: Path) -> None:
    native.library("k", SOURCE)
    (made,) = entries(tmp_path)
    made.unlink()  # this process has it mapped: to write into it would crash it when it ends
    made.write_bytes(b"no library")
    assert native.library("k", SOURCE).answer() == 42
    assert made.read_bytes().startswith(b"\x7fELF")


def test_a_library_that_others_can_write_is_not_trusted(native: ModuleType, tmp_path: Path) -> None:
    native.library("k", SOURCE)
    (made,) = entries(tmp_path)
    planted = SOURCE.replace(b"42", b"13")
    native.library("planted", planted)
    (other,) = (entry for entry in entries(tmp_path) if entry != made)
    other.replace(made)
    made.chmod(0o666)
    assert native.library("k", SOURCE).answer() == 42
    assert made.stat().st_mode & 0o777 == 0o600


def test_where_the_cache_cannot_be_written_it_is_compiled_each_time(
    native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MNEMOC_CACHE", str(tmp_path / "file"))
    assert native.library("k", SOURCE).answer() == 42
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("without", ["no compiler", "one that fails", "a source it refuses"])
def test_without_a_compiler_torch_does_it_and_one_line_says_so(
    without: str,
    kit: Any,
    fresh: Callable[[], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MNEMOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "0")
    if without == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", "false" if without == "one that fails" else "cc -include none.h")
    module = fresh()
    assert module.COMPILED is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("mnemoc: attention_decode runs slower, without a C compiler: ")
    case = kit.case(kit.spec("cpu"), [(1, 70, 69), (1, 0, 3), (1, 20, 5)])
    kit.check(case, case.run(module, "attention_decode"))


def test_only_the_first_worker_says_it(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", os.devnull)
    monkeypatch.setenv("RANK", "1")
    assert native.library("k", SOURCE) is None
    assert capfd.readouterr().err == ""
