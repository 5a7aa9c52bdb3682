"""`mnemoc serve`: an engine behind a listening socket, until told to stop."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from ...errors import BadInput
from ..engine import Engine
from ..executor import outside
from ..tokenizer import FILE, Tokenizer
from .app import create_app
from .chronicle import Chronicle, Relay, Writer
from .conversation import Template
from .draining import FLUSH_S, Doors, DrainingServer
from .journal import Journal
from .options import Options
from .spans import Spans, configured

MOST_MILLISECONDS = 2**31 - 1
"""The longest time-out that a socket takes: 24 days."""


def serve(
    directory: Path,
    weights: Path,
    host: str,
    port: int,
    options: Options | None = None,
    *,
    template: Template | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Serve a plan until told to stop (`draining`). The port is taken before any worker starts.

    template: how the model reads a conversation; else it gets a plain form
    Raises BadInput for a port that cannot be had, whatever `Engine.start` raises, and why the engine gave up.
    """
    options = options or Options()
    say = progress or (lambda message: None)
    allow_connections()
    with bind(host, port, options.limits.send_s) as listener, chronicled(options) as chronicle:
        launcher = outside.at(options.control, directory, os.environ) if options.control else None
        tokenizer = Tokenizer(weights) if (weights / FILE).is_file() else None
        with Engine.start(
            directory,
            weights,
            progress=progress,
            nursery=launcher,
            policy=options.policy,
            prefix_caching=options.prefix_caching,
            trace_out=options.trace_out,
            step_timeout_s=options.step_timeout_s,
        ) as engine:
            name, where = listener.getsockname()[:2]
            doors = Doors(create_app(engine, tokenizer, options, template, chronicle))
            config = uvicorn.Config(
                doors,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=FLUSH_S,
            )
            address = f"http://{name}:{where}/v1"
            server = DrainingServer(
                config, doors, engine, options.drain_s, lambda: say(f"serving on {address}")
            )
            server.run(sockets=[listener])
            if server.fault is not None:
                raise server.fault


@contextlib.contextmanager
def chronicled(options: Options) -> Iterator[Chronicle | None]:
    """The log and the traces that were asked for; meanwhile what Python's loggers say goes there too."""
    writers: list[Writer] = []
    if options.log_format is not None:
        writers.append(Journal(options.log_format, options.log_file))
    if configured(options.otlp_endpoint):
        writers.append(Spans(options.otlp_endpoint))
    if not writers:
        yield None
        return
    with Chronicle(writers) as chronicle:
        relay, root = Relay(chronicle), logging.getLogger()
        if options.log_format is not None:
            root.addHandler(relay)
        try:
            yield chronicle
        finally:
            root.removeHandler(relay)


def allow_connections() -> None:
    """As many descriptors as this process may have: each open stream takes one, and 1,024 are soon used."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bind(host: str, port: int, send_s: float | None = None) -> socket.socket:
    """A listening socket, or a sentence that says why not. send_s: as in `Limits`, of its connections"""
    where = f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise BadInput("a port lies in 0..65535", got=port)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=512)
    except socket.gaierror as error:
        raise BadInput("no such host", where=where, do="give an address of this machine") from error
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise BadInput(
            f"cannot listen: {reason}", where=where, do=f"choose another {other}"
        ) from error
    if send_s is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = min(math.ceil(1e3 * send_s), MOST_MILLISECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listener
