"""What a plan's folder shows: `mnemoc show` and `mnemoc export`."""

import contextlib
import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import MNEMOC


def test_show_prints_plan_ir_schedule_kernels_and_any_file(made: Path, mnemoc: Any) -> None:
    def show(*what: str) -> str:
        ran = mnemoc("show", made / "plan", *what)
        assert ran.code == 0
        assert "\x1b" not in ran.out
        return str(ran.out)

    assert show() == show("plan")
    assert "SPP" in show()
    assert "func @layer" in show("ir")
    assert show("schedule").count("def step(") == 2
    assert "def rms_norm(" in show("kernel", "rms_norm")
    assert show("cost.py") == (made / "plan" / "cost.py").read_text()


def test_show_says_where_the_report_lies_and_opens_it(
    made: Path, mnemoc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = made / "plan" / "report.html"
    ran = mnemoc("show", made / "plan", "report")
    assert (ran.code, ran.out) == (0, f"{page}\n")
    assert "--open" in ran.err
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    ran = mnemoc("show", made / "plan", "report", "--open")
    assert (ran.code, ran.out, ran.err) == (0, f"{page}\n", "")
    assert opened == [page.resolve().as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    ran = mnemoc("show", made / "plan", "report", "--open")
    assert ran.code == 2
    assert str(page) in ran.sentence
    ran = mnemoc("show", made / "plan", "ir", "--open")
    assert ran.code == 2
    assert "report --open" in ran.sentence


@pytest.mark.parametrize(
    ("file", "word"), [("schedule/stage_0.py", "def step("), ("ir/planned.mir", "func @layer")]
)
def test_a_terminal_gets_colours(file: str, word: str, made: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*MNEMOC, "show", str(made / "plan"), file]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=theirs, env=env)
    os.close(theirs)
    pieces = []
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    os.close(ours)
    assert process.wait(timeout=30) == 0
    shown = b"".join(pieces).decode()
    assert "\x1b[" in shown
    assert word in re.sub(r"\x1b\[[0-9;]*m", "", shown)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_a_plan_is_exported_to_stdout_a_file_or_json(
    engine: str, made: Path, tmp_path: Path, mnemoc: Any
) -> None:
    words = ("export", made / "plan", "--to", engine)
    text = mnemoc(*words).out
    assert "cannot express" in text
    ran = mnemoc(*words, "-o", "out")
    assert ran.code == 0
    assert (tmp_path / "out").read_text() == text
    assert os.access(tmp_path / "out", os.X_OK) == text.startswith("#!")
    body = json.loads(mnemoc(*words, "--json").out)
    assert body["text"] == text
    assert body["engine"] == engine
    assert {"what", "why"} == set(body["gaps"][0])


def test_exports_refuse_unknown_engines_no_plans_and_unwritable_files(
    made: Path, tmp_path: Path, mnemoc: Any
) -> None:
    assert mnemoc("export", made / "plan", "--to", "tgi").code == 2
    ran = mnemoc("export", tmp_path, "--to", "vllm")
    assert (ran.code, "not a plan" in ran.sentence) == (4, True)
    ran = mnemoc("export", made / "plan", "--to", "vllm", "-o", tmp_path / "no" / "out")
    assert (ran.code, "cannot write" in ran.sentence) == (4, True)
    assert not list(tmp_path.iterdir())
