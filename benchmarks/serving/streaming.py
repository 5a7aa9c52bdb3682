"""Streams: tokens a second for each core of the server's process, its engine's thread and its event loop.

    python -m benchmarks.serving.streaming      also benchmarks/results/streaming.{json,md}

The workers answer at once (`instant.py`), so nothing else is at work. What counts is the processor time of
the server's process, whole requests included; other programs on the machine cost it nothing. Paced: steps
come no faster than the server can send each token as an event of its own, as with a real model. Flat out:
the engine is ahead of the event loop, and tokens travel together.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import selectors
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..harness import Figure, say, write_report
from .client import post
from .server import Served, Setup, server, small_setup


@dataclass(frozen=True)
class Case:
    """So many streams at once, of so many tokens each, a step every `step_s` seconds."""

    streams: int
    tokens: int
    step_s: float

    @property
    def pace(self) -> str:
        return f"a step every {self.step_s * 1e3:g} ms" if self.step_s else "flat out"


CASES = (
    Case(1, 5000, 1e-3),
    Case(32, 2500, 4e-3),
    Case(256, 500, 25e-3),
    Case(1, 5000, 0.0),
    Case(32, 4000, 0.0),
    Case(256, 1000, 0.0),
)


@dataclass(frozen=True)
class Streamed:
    """What came, and what it took the server's process. events: with text"""

    tokens: int
    events: int
    wall_s: float
    cpu_s: float

    @property
    def tokens_per_core_s(self) -> float:
        return self.tokens / self.cpu_s


def stream(served: Served, case: Case) -> Streamed:
    """All streams at once, read as fast as they come."""
    body = {
        "prompt": [97, 98, 99],
        "max_tokens": case.tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    before_s, began_s = served.cpu_s, time.monotonic()
    received = read_all(served.port, post(body), case.streams)
    wall_s, cpu_s = time.monotonic() - began_s, served.cpu_s - before_s
    tokens = sum(usage(text) for text in received)
    events = sum(text.count(b'"text"') for text in received)
    return Streamed(tokens, events, wall_s, cpu_s)


def read_all(port: int, request: bytes, count: int) -> list[bytes]:
    """`count` times the same request, each on its own connection, until each stream has ended."""
    received: list[list[bytes]] = [[] for _ in range(count)]
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as open_:
        for chunks in received:
            connection = open_.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, chunks)
        while selector.get_map():
            for key, _ in selector.select():
                connection, chunks = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                chunks.append(connection.recv(1 << 18))
                if b"[DONE]" in b"".join(chunks[-2:]) or not chunks[-1]:
                    selector.unregister(connection)
    return [b"".join(chunks) for chunks in received]


def usage(text: bytes) -> int:
    """The tokens that a stream says it had, in its last event."""
    return int(re.findall(rb'"completion_tokens": ?(\d+)', text)[-1])


def measure(setup: Setup, case: Case) -> Streamed:
    """Once for nothing, then once that counts."""
    with server(setup, ("benchmarks.serving.instant", str(case.step_s))) as served:
        stream(served, Case(case.streams, 20, case.step_s))
        result = stream(served, case)
    assert result.tokens == case.streams * case.tokens, "each stream has all its tokens"
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.parse_args()
    figures, runs = [], []
    with tempfile.TemporaryDirectory(prefix="mnemoc-streaming.") as folder:
        setup = small_setup(Path(folder), pages=8192)
        for case in CASES:
            result = measure(setup, case)
            runs.append({**asdict(case), **asdict(result)})
            detail = (
                f"{result.tokens:,} tokens in {result.events:,} events, {result.cpu_s:.2f} s of "
                f"processor time in {result.wall_s:.1f} s"
            )
            name = f"{case.streams} stream{'s' if case.streams > 1 else ''}, {case.pace}"
            figures.append(Figure(name, result.tokens_per_core_s, "tokens/s per core", "", detail))
            say(f"{name}: {result.tokens_per_core_s:,.0f} tokens/s per core; {detail}")
    write_report("streaming", "HTTP streaming", figures, {"cases": runs})


if __name__ == "__main__":
    main()
