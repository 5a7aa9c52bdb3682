"""Every command of every page in docs/ runs: its ```sh blocks as one script, from top to bottom.

A page finds a random `model` and a `plan` of it for this machine, if it names them. Blocks in other languages
(```console, ```text, …) are for reading: what needs a GPU, a cluster or a registry.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {page.stem: BLOCK.findall(page.read_text()) for page in sorted(DOCS.glob("*.md"))}
PORT = "8000"
"""In the pages; what is free stands in for it."""


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a plan."""
    folder = tmp_path_factory.mktemp("docs")
    run(
        "mnemoc init-model tiny-llama model --seed 1\n"
        "mnemoc plan model --cluster local --no-calibrate --gpus 1 "
        "--context 4K --ttft 60s --tbt 1s -o plan",
        folder,
    )
    return folder


def run(script: str, folder: Path) -> None:
    """As a person would: in a shell that stops at the first failure. What it leaves running is ended."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / "output.txt").open("w+") as output:
        shell = subprocess.Popen(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
            shell.wait()
        output.seek(0)
        assert code == 0, output.read()[-4000:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_the_commands_of_a_page_run(page: str, ready: Path, tmp_path: Path) -> None:
    for name in ("model", "plan"):
        (tmp_path / name).symlink_to(ready / name)
    run("\n".join(PAGES[page]).replace(PORT, free_port()), tmp_path)


def test_pages_link_to_what_exists() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
