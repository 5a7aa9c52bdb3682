"""A server in a thread of this process, over an engine of the test's own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import uvicorn
from mnemoc.runtime.server import bind

Serving = Callable[..., AbstractContextManager[str]]


@contextlib.contextmanager
def _serving(app: Any, port: int = 0) -> Iterator[str]:
    with bind("127.0.0.1", port) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serving() -> Serving:
    """serving(app, port=0) → a context: the application's address while it listens."""
    return _serving
