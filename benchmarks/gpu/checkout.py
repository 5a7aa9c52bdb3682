"""Makes this checkout importable as `mnemoc`, here and in child processes, without installing it.

The repository's root is the package, and its folder may have any name. So a folder of its own holds a link
named `mnemoc` to the root, and stands first on the path. The root itself leaves the path: its modules
(`codec`, `runtime`, …) are no top-level modules.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "triton", "numpy", "jinja2", "sympy", "networkx")
_LINKED = "MNEMOC_BENCH_LINKED"


def make_importable() -> None:
    """Put `mnemoc` on sys.path and PYTHONPATH. A process that was started by one that did, has it."""
    owner, _, folder = os.environ.get(_LINKED, "").partition(":")
    if not folder:
        owner, folder = str(os.getpid()), tempfile.mkdtemp(prefix="mnemoc-path-")
        Path(folder, "mnemoc").symlink_to(ROOT, target_is_directory=True)
        os.environ[_LINKED] = f"{owner}:{folder}"
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, before)))
    if owner == str(os.getpid()):
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    here = {"", str(ROOT), str(Path.cwd()) if Path.cwd().resolve() == ROOT else ""}
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in here | {folder})]


def missing() -> list[str]:
    """What is needed and not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]
