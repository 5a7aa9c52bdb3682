"""A server in a thread of this process, over an engine of one worker that tests of the HTTP side share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from mnemoc.runtime import Engine
from mnemoc.runtime.executor.workers import NurseryProcess
from mnemoc.runtime.server import Options, Template, bind, create_app
from mnemoc.runtime.tokenizer import Tokenizer

Front = Callable[..., AbstractContextManager[str]]


@contextmanager
def _serving(app: Any, port: int = 0, send_s: float | None = None) -> Iterator[str]:
    with bind("127.0.0.1", port, send_s) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serving() -> Front:
    """`with serving(app, port=0) as url:` the application while it listens."""
    return _serving


@pytest.fixture(scope="module")  # not longer: a nursery serves one engine after another
def engine(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> Iterator[Engine]:
    model = models("llama")
    plan = plans(model, num_pages=128, context=1500)
    with Engine.start(plan, model, nursery=nursery) as running:
        yield running


@pytest.fixture(scope="module")
def front(models: Callable[..., Path], engine: Engine) -> Front:
    """`with front(options, template) as url:` a server over the shared engine."""

    def served(
        options: Options | None = None, template: Template | None = None
    ) -> AbstractContextManager[str]:
        app = create_app(engine, Tokenizer(models("llama")), options, template)
        return _serving(app, send_s=options.limits.send_s if options else None)

    return served


@pytest.fixture(scope="module")
def url(front: Front) -> Iterator[str]:
    """A server as it is without options."""
    with front() as address:
        yield address
