"""Files and folders that are there whole or not at all: written aside first, then put in their place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BadInput


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A folder to fill, which in the end becomes `directory`; only an empty one may stand there then.

    BadInput where that cannot be written; whatever goes wrong, nothing half-written is left.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            yield aside
            aside.chmod(0o755)
            os.replace(aside, directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise BadInput(f"cannot write: {error.strerror}", where=directory) from error


def write_whole(path: Path, text: str) -> None:
    """A file, and the folders above it. BadInput where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write: {error.strerror}", where=path) from error
