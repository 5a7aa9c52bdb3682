"""Running the command line in this process: fast, and what it prints is seen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mnemoc.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command left with."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on stderr that a user's error must be."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("mnemoc: ")
        return lines[0]


Mnemoc = Callable[..., Ran]


@pytest.fixture
def mnemoc(capsys: pytest.CaptureFixture[str]) -> Mnemoc:
    """mnemoc("plan", "tiny-llama", ...) → exit code, stdout, stderr."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        assert "Traceback" not in err
        return Ran(leaving.value.code, out, err)

    return run


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in an empty folder, so that what they leave behind is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNEMOC_CACHE", str(tmp_path.parent / "no-cache"))
