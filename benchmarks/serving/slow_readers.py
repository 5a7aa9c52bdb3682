"""What clients that never read do to one that does, where the server could stream far more than it must.

    python -m benchmarks.serving.slow_readers      also benchmarks/results/slow_readers.{json,md}

Workers that answer at a pace (`instant.py`), and a reader of one stream: alone, beside many that are read by
another process, and beside as many that nobody reads, whose sockets and buffers are full by then. These take
turns, and each turn opens all of its streams anew. In the end one of those that stood still reads: nothing
may be missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..harness import Figure, percentile, say, write_report
from .client import post, stalled
from .server import Served, Setup, server, small_setup

STREAMS, STEP_S = 250, 0.05
"""Some 5,000 tokens a second: a quarter of what one core sends as an event each."""
REPEATS = 3
SPAN_S = 15.0
"""How long the reader is watched in each turn."""
SETTLE_S, FILL_S = 2.0, 45.0
"""Before that, once all streams run: for those that nobody reads to be full."""
TOKENS = 4000
MIB = 2**20
MUCH = 50
"""Tokens in one event: these were put together while nobody read."""


def request(number: int) -> bytes:
    """With long events, so that buffers are soon full."""
    body = {
        "prompt": [97, 98, 99],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
        "request_id": f"{number:0128}",
    }
    return post(body)


@dataclass(frozen=True)
class Turn:
    """gaps_s: between the reader's events; memory of the server before the streams, and at both ends of the
    span; cpu: share of a core that the server's process took in it; late: events that one of those that
    stood still got in the end, and the tokens in them
    """

    beside: str
    gaps_s: list[float]
    before_bytes: int
    full_bytes: int
    end_bytes: int
    cpu: float
    late: tuple[int, int] | None


def gaps(served: Served, seconds: float) -> list[float]:
    """Between the events of a stream that is read as it comes."""
    found: list[float] = []
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(request(STREAMS))
        last_s, until_s = None, time.monotonic() + seconds
        while (now_s := time.monotonic()) < until_s:
            if b"data: {" in connection.recv(1 << 16):
                now_s = time.monotonic()
                found += [] if last_s is None else [now_s - last_s]
                last_s = now_s
    return found


def nobody(served: Served) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def readers(served: Served) -> Iterator[None]:
    """In a process of their own."""
    reading = multiprocessing.get_context("spawn").Process(target=read_all, args=(served.port,))
    reading.start()
    try:
        yield
    finally:
        reading.kill()
        reading.join()


def read_all(port: int) -> None:
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as open_:
        for number in range(STREAMS):
            connection = open_.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(request(number))
            selector.register(connection, selectors.EVENT_READ, connection)
        while True:
            for key, _ in selector.select():
                key.data.recv(1 << 16)


@contextlib.contextmanager
def standing_still(served: Served) -> Iterator[socket.socket]:
    """Open, and never read; one of them."""
    with contextlib.ExitStack() as open_:
        for number in range(STREAMS):
            connection = open_.enter_context(stalled(served.port, request(number)))
        yield connection


def catch_up(connection: socket.socket) -> tuple[int, int]:
    """Events and tokens of a stream that has not been read so far. Raises SystemExit if text is missing."""
    received, usage = b"", 0
    texts: list[str] = []
    connection.settimeout(10)
    while not (texts and len(texts[-1]) == 1 and max(map(len, texts)) > MUCH):
        if not (more := connection.recv(1 << 20)):
            raise SystemExit(f"the stream ended, and no event had more than {MUCH} tokens")
        received += more
        lines = received.split(b"\n\n")
        received = lines.pop()
        for line in lines:
            if (at := line.find(b"data: {")) >= 0:
                event = json.loads(line[at + 6 :])
                texts.append(event["choices"][0]["text"])
                usage = event["usage"]["completion_tokens"]
    text = "".join(texts)
    letters = "".join(chr(ord("a") + i % 26) for i in range(len(text)))
    if text != letters or len(text) != usage:
        raise SystemExit(
            f"{usage} tokens, and {len(text)} letters of text, not all as they should be"
        )
    return len(texts), usage


CASES: dict[str, Callable[[Served], AbstractContextManager[socket.socket | None]]] = {
    "nobody": nobody,
    "as many that are read": readers,
    "as many that nobody reads": standing_still,
}


def turn(served: Served, beside: str) -> Turn:
    before = served.settled()
    with CASES[beside](served) as other:
        while beside != "nobody" and served.metrics()["num_requests_running"] < STREAMS:
            time.sleep(0.2)
        time.sleep(FILL_S if other else SETTLE_S)
        full, cpu_s, began_s = served.state(), served.cpu_s, time.monotonic()
        found = gaps(served, SPAN_S)
        cpu = (served.cpu_s - cpu_s) / (time.monotonic() - began_s)
        end = served.state()
        late = catch_up(other) if other else None
    sizes = before.server_bytes, full.server_bytes, end.server_bytes
    return Turn(beside, found, *sizes, cpu, late)


def figures(turns: Sequence[Turn]) -> list[Figure]:
    made = []
    for beside in CASES:
        some = [one for one in turns if one.beside == beside]
        gaps_ms = [gap_s * 1e3 for one in some for gap_s in one.gaps_s]
        p99 = percentile(gaps_ms, 99)
        worst = ", ".join(f"{max(one.gaps_s) * 1e3:.0f}" for one in some)
        cpu = statistics.median(one.cpu for one in some)
        detail = (
            f"p50 {percentile(gaps_ms, 50):.1f}; worst of each turn: {worst}; "
            f"{len(gaps_ms):,} gaps; the server's process at {cpu:.0%} of a core"
        )
        made.append(Figure(f"beside {beside}: p99 of the reader's gaps", p99, "ms", "", detail))
    still = [(one, one.late) for one in turns if one.late]
    first, tokens = still[0][0], round(SPAN_S / STEP_S)
    stood = (first.full_bytes - first.before_bytes) / STREAMS / 1024
    more = statistics.median(one.end_bytes - one.full_bytes for one, _ in still) / STREAMS
    ends = ", ".join(f"{one.end_bytes / MIB:.0f}" for one, _ in still)
    detail = f"of the server's, the first time; all of it at each end: {ends} MiB"
    made.append(Figure("that nobody reads: memory of each", stood, "KiB", "bounded", detail))
    detail = f"median, over {tokens} tokens: its id, its time, its text"
    made.append(Figure("that nobody reads: of each token more", more / tokens, "bytes", "", detail))
    told = ", ".join(f"{late[0]} for {late[1]} tokens" for _, late in still)
    events = statistics.median(late[0] for _, late in still)
    made.append(
        Figure("that is read in the end: events", events, "", "", f"{told}: all of the text")
    )
    return made


def measure(setup: Setup) -> list[Turn]:
    turns = []
    with server(setup, ("benchmarks.serving.instant", str(STEP_S))) as served:
        for _ in range(REPEATS):
            for beside in CASES:
                one = turn(served, beside)
                turns.append(one)
                worst_ms, cpu = max(one.gaps_s) * 1e3, one.cpu
                say(f"beside {beside}: worst {worst_ms:.0f} ms, {cpu:.0%} of a core, {one.late}")
    return turns


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="mnemoc-slow.") as folder:
        turns = measure(small_setup(Path(folder), pages=40_000))
    title = f"A reader beside {STREAMS} streams, a token each every {STEP_S * 1e3:.0f} ms"
    runs: dict[str, Any] = {"turns": [asdict(one) for one in turns]}
    write_report("slow_readers", title, figures(turns), runs)


if __name__ == "__main__":
    main()
