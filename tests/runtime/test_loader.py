"""The artifact's modules: imported from the checked bytes, and only those asked for."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path

import pytest
from mnemoc.errors import BadInput, RuntimeFault
from mnemoc.runtime.loader import ArtifactModules

FILES = {
    "kernels/__init__.py": b"",
    "kernels/double.py": b"def double(x):\n    return 2 * x  # checked\n",
    "kernels/twice.py": b"from .double import double\n\ndef twice(x):\n    return double(double(x))\n",
    "schedule/stage_0.py": b"from ..kernels.twice import twice\n\ndef step(x):\n    return twice(x)\n",
    "schedule/stage_1.py": b"raise RuntimeError('not my role')\n",
    "cost.py": b"PARTS = ('linear',)\n",
    "report.html": b"<html>",
}
WANTED = ("kernels/", "schedule/stage_0.py")


def test_modules_import_one_another_relatively(tmp_path: Path) -> None:
    step = ArtifactModules(tmp_path, FILES, WANTED).load("schedule.stage_0").step
    assert step(3) == 12


def test_only_what_was_asked_for_can_be_imported(tmp_path: Path) -> None:
    modules = ArtifactModules(tmp_path, FILES, WANTED)
    with pytest.raises(BadInput, match=r"cost\.py: the plan has no such file"):
        modules.load("cost")
    with pytest.raises(BadInput, match=r"stage_1\.py"):
        modules.load("schedule.stage_1")


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    files = {**FILES, "kernels/twice.py": b"from flash_of_nobody import twice\n"}
    with pytest.raises(RuntimeFault, match=r"the plan needs is missing: .*flash_of_nobody"):
        ArtifactModules(tmp_path, files, WANTED).load("schedule.stage_0")


def test_the_files_on_disk_are_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/double.py").write_text("def double(x):\n    return 'changed'\n")
    step = ArtifactModules(tmp_path, FILES, WANTED).load("schedule.stage_0").step
    assert step(1) == 4


def test_sources_are_found_by_inspect_and_shown_in_tracebacks(tmp_path: Path) -> None:
    modules = ArtifactModules(tmp_path, FILES, WANTED)
    double = modules.load("kernels.double").double
    assert inspect.getsource(double) == FILES["kernels/double.py"].decode()
    with pytest.raises(TypeError) as caught:
        modules.load("schedule.stage_0").step(None)
    trace = "".join(traceback.format_exception(caught.value))
    assert "return 2 * x  # checked" in trace
    assert str(tmp_path / "kernels/double.py") in trace


def test_two_artifacts_live_side_by_side(tmp_path: Path) -> None:
    other = {**FILES, "kernels/double.py": b"def double(x):\n    return x\n"}
    one = ArtifactModules(tmp_path, FILES, WANTED).load("schedule.stage_0")
    two = ArtifactModules(tmp_path, other, WANTED).load("schedule.stage_0")
    assert (one.step(1), two.step(1)) == (4, 1)
