"""The shell's manners: help, exit codes, no tracebacks, quiet endings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from mnemoc import cli
from mnemoc.errors import BadInput, Infeasible, RuntimeFault, UsageError

from .conftest import MNEMOC

COMMANDS = (
    "plan", "predict", "show", "export", "verify", "run", "replay", "simulate", "serve", "init-model",
    "calibrate",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str, mnemoc: Any) -> None:
    ran = mnemoc(command, "--help")
    assert ran.code == 0
    assert "Example:" in ran.out
    assert f"mnemoc {command} " in ran.out


def test_help_names_every_command(mnemoc: Any) -> None:
    ran = mnemoc("--help")
    assert ran.code == 0
    assert all(f"  {command} " in ran.out for command in COMMANDS)


def test_the_version_is_printed(mnemoc: Any) -> None:
    assert mnemoc("--version").out.startswith("mnemoc 0.")


@pytest.mark.parametrize("words", [("plan",), ("dance",), ("show",), ("plan", "--fast")])
def test_a_wrong_command_line_exits_with_2_and_says_how(
    words: tuple[str, ...], mnemoc: Any
) -> None:
    ran = mnemoc(*words)
    assert ran.code == 2
    assert "Error: " in ran.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("two of them", where="--nodes"), 2),
        (Infeasible("no plan keeps TTFT", binding="TTFT"), 3),
        (BadInput("not a config", where="x.json", got=3, do="write one"), 4),
        (RuntimeFault("a worker died"), 1),
        (RuntimeError("surprise"), 1),
    ],
)
def test_errors_become_one_sentence_and_their_exit_code(
    error: Exception, code: int, mnemoc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    ran = mnemoc("fail")
    assert ran.code == code
    assert str(error) in ran.sentence


def test_an_infeasible_plan_is_json_where_a_machine_reads(
    mnemoc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, Infeasible("no plan", binding="TTFT", do="allow 80s"))
    ran = mnemoc("fail", "--json")
    assert ran.code == 3
    assert json.loads(ran.out) == {
        **{"error": "no plan; allow 80s", "exit_code": 3, "binding": "TTFT"},
        **{"nearest": [], "frontier": None},
    }


def test_debugging_shows_the_traceback(mnemoc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, BadInput("not a config"))
    monkeypatch.setenv("MNEMOC_DEBUG", "1")
    with pytest.raises(BadInput):
        cli.main(["fail"])


def test_an_interruption_is_quiet(mnemoc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    ran = mnemoc("fail")
    assert ran.code == 130
    assert not ran.err.strip()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A command `fail` that raises."""

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def fail(as_json: bool) -> None:
        raise error

    monkeypatch.setitem(cli.cli.commands, "fail", fail)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "from mnemoc.cli import main; import time; time.sleep(0.5); main(['--help'])"
    script = f'{sys.executable} -c "{program}" | true; echo ${{PIPESTATUS[0]}}'
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "141"
    assert not ran.stderr


def test_ctrl_c_ends_a_real_process_quietly_with_nothing_left_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*MNEMOC, "init-model", "llama-3-8b", "big"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not err.strip()
    assert not list(tmp_path.iterdir())


def test_help_is_instant() -> None:
    """By its own time: the machine may be busy."""
    with subprocess.Popen([*MNEMOC, "--help"], stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 2.0
