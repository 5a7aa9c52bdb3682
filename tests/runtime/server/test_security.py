"""What no request may reach: the file system, code, weights that are programs.

Beside this file: keys are compared in constant time (test_limits.py), an artifact is verified before a line
of it runs (test_faults.py), weights without safetensors are refused (test_weights.py).
"""

from __future__ import annotations

import ast
import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import mnemoc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(mnemoc.__file__).parent
STARTS = {"journal.py", "options.py", "serve.py", "spans.py"}
"""They run before the first request, with what the operator says."""

FILES = {"glob", "io", "os", "pathlib", "shutil", "subprocess", "tempfile"}
IN_MEMORY = "from io import StringIO"
"""Text that grows, and no file."""
PROGRAMS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def imported(path: Path) -> set[str]:
    """Top-level names of absolute imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and ast.unparse(node) == IN_MEMORY:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def called(path: Path) -> set[str]:
    """Names of what is called, as they stand: open, torch.load."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {ast.unparse(call.func) for call in calls}


def test_no_route_knows_the_file_system() -> None:
    routes = [path for path in (ROOT / "runtime/server").glob("*.py") if path.name not in STARTS]
    assert len(routes) > 10
    for path in routes:
        assert not imported(path) & FILES, path
        assert not called(path) & {"open", "eval", "exec", "__import__", "FileResponse"}, path


def test_nothing_of_ours_unpickles() -> None:
    for package in ("runtime", "codegen", "planner", "ir"):
        for path in (ROOT / package).rglob("*.py"):
            assert not imported(path) & PROGRAMS, path
            assert "torch.load" not in called(path), path


@pytest.fixture(scope="module")
def opened(url: str) -> Iterator[list[str]]:
    """Files that this process opens, server and all, while a test looks.

    But for sources of our own: FastAPI reads a route's, once, to be able to say where it failed.
    """
    paths: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen"):
            path = str(arguments[0])
            if not (path.startswith(str(ROOT / "runtime/server")) and path.endswith(".py")):
                paths.append(path)

    ask(url, "GET", "/openapi.json")  # imports what it needs, once
    sys.addaudithook(hook)
    yield paths
    watching = False


def ask(url: str, method: str, path: str, body: bytes | None = None) -> int:
    """A request as it stands: clients of a higher kind would tidy the path."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.putrequest(method, path, skip_accept_encoding=True)
    if body is not None:
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


TRAILS = [
    "..",
    "%2e%2e",
    "..%2f",
    "%2f",
    "",
    "etc",
    "passwd",
    "v1",
    "models",
    "%00",
    "~root",
    "C:\\",
    ".",
]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.sampled_from(TRAILS), max_size=8), method=st.sampled_from(["GET", "POST"]))
def test_no_path_leads_to_a_file(
    url: str, opened: list[str], parts: list[str], method: str
) -> None:
    opened.clear()
    assert ask(url, method, "/" + "/".join(parts)) in (200, 307, 400, 404, 405)
    assert opened == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "\0"])
def test_no_name_in_a_body_leads_to_a_file(url: str, opened: list[str], name: str) -> None:
    hi = [{"role": "user", "content": "hi", "name": name}]
    opened.clear()
    for path, body in (
        ("/v1/completions", {"prompt": name, "max_tokens": 1, "model": name}),
        ("/v1/completions", {"prompt": name, "max_tokens": 1, "user": name, "suffix": name}),
        ("/v1/chat/completions", {"messages": hi, "max_tokens": 1, "chat_template": name}),
        ("/v1/chat/completions", {"messages": hi, "max_tokens": 1}),
        ("/tokenize", {"messages": hi, "chat_template_kwargs": {"path": name}}),
    ):
        assert ask(url, "POST", path, json.dumps(body).encode()) in (200, 400, 404)
    assert opened == []


def test_the_watch_sees_a_file_that_is_opened(opened: list[str]) -> None:
    opened.clear()
    Path(__file__).read_text()
    assert opened == [__file__]
