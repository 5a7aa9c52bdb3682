"""A plan that the shell made, and the command line in this process: fast, and what it prints is seen."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mnemoc.cli import main

MNEMOC = (sys.executable, "-m", "mnemoc")
LOCAL = ("--cluster", "local", "--context", "2K", "--output-tokens", "16", "--ttft", "60s")
TWO_STAGES = ("--tbt", "1s", "--gpus", "2", "--layout", "tp=1,spp=2,kvp=1")

MANY_MACHINES = """
name = "many"
device = "CPU core"
target = "cpu"
nodes = { value = 16, unit = "nodes", source = "made up" }
devices_per_node = { value = 8, unit = "devices", source = "made up" }
peak.float32 = { value = 50, unit = "GFLOP/s", source = "made up" }
memory.bandwidth = { value = 10, unit = "GB/s", source = "made up" }
memory.capacity = { value = 4, unit = "GB", source = "made up" }
memory.reserve = { value = 0.5, unit = "GB", source = "made up" }
efficiency.link = { value = 1.0, unit = "1", source = "made up" }
efficiency.matmul = { value = 0.8, unit = "1", source = "made up" }
efficiency.attention_prefill = { value = 0.6, unit = "1", source = "made up" }
efficiency.attention_decode = { value = 0.8, unit = "1", source = "made up" }
efficiency.memory = { value = 0.8, unit = "1", source = "made up" }
overhead.launch = { value = 5, unit = "us", source = "made up" }
overhead.iteration = { value = 300, unit = "us", source = "made up" }
links.intra.latency = { value = 400, unit = "us", source = "made up" }
links.intra.bandwidth = { value = 1, unit = "GB/s", source = "made up" }
links.inter.latency = { value = 400, unit = "us", source = "made up" }
links.inter.bandwidth = { value = 1, unit = "GB/s", source = "made up" }
"""


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


@pytest.fixture(scope="session")
def many_machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a cluster that nobody has."""
    file = tmp_path_factory.mktemp("machines") / "many.toml"
    file.write_text(MANY_MACHINES)
    return file


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and its plan/ for two stages."""
    folder = tmp_path_factory.mktemp("made")
    commands: tuple[tuple[str, ...], ...] = (
        ("init-model", "tiny-llama", "model", "--max-shard-size", "4M"),
        ("plan", "model", *LOCAL, *TWO_STAGES, "-o", "plan", "--json"),
    )
    for words in commands:
        subprocess.run([*MNEMOC, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


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
