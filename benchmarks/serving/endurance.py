"""What stays behind of 10,000 requests, of 1,000 streams that stand still, of 1,000 clients that leave.

python -m benchmarks.serving.endurance      also benchmarks/results/endurance.{json,md}
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..harness import Figure, percentile, say, write_report
from .client import ask, leave, post, stalled
from .server import Served, Setup, State, server, small_setup
from .soak import drift

MIB = 2**20
AT_ONCE = 32
UNREAD_TOKENS, STEP_S = 2000, 0.025
"""So that all of them are open before the first has its last token."""
TOGETHER_S = 5.0
"""How long the queue is watched while it is full."""


# --------------------------------------------------------------------------- many requests


def many(served: Served, count: int, choose: random.Random) -> list[State]:
    """The server before, and after each tenth of so many requests, idle each time."""
    states = [served.settled()]
    for _ in range(10):
        asyncio.run(_at_once([_short(served, choose) for _ in range(count // 10)]))
        states.append(served.settled())
        say(f"  {len(states) - 1} tenths: {states[-1]}")
    return states


async def _short(served: Served, choose: random.Random) -> None:
    """A short request, every other one streamed."""
    prompt = [choose.randrange(256) for _ in range(choose.randrange(5, 40))]
    streamed = choose.random() < 0.5
    body = {"prompt": prompt, "max_tokens": 6, "ignore_eos": True, "stream": streamed}
    reply = await ask(served.port, post(body))
    assert reply.status == 200 and (reply.done or not streamed), reply


async def _at_once(all_of: Sequence[Coroutine[Any, Any, None]], at_once: int = AT_ONCE) -> None:
    room = asyncio.Semaphore(at_once)

    async def one(coroutine: Coroutine[Any, Any, None]) -> None:
        async with room:
            await coroutine

    await asyncio.gather(*map(one, all_of))


# --------------------------------------------------------------------------- clients that leave


def leaving(served: Served, count: int, choose: random.Random) -> tuple[State, State, float]:
    """The server before, after so many clients have left at random moments, and seconds until it was idle."""
    before = served.settled()
    asyncio.run(_at_once([_leaver(served, choose) for _ in range(count)], 50))
    began_s = time.monotonic()
    after = served.settled()
    return before, after, time.monotonic() - began_s


async def _leaver(served: Served, choose: random.Random) -> None:
    """Leaves in the midst of head or body, while it waits, prefills or decodes; streamed or not."""
    size = choose.choice((20, 20, 500, 4000))
    body = {"prompt": [7] * size, "max_tokens": 100, "ignore_eos": True}
    request = post({**body, "stream": choose.random() < 0.5})
    if choose.random() < 0.3:
        request = request[: choose.randrange(1, len(request))]
    await leave(
        served.port,
        request,
        after_s=choose.choice((0.0, choose.random() * 0.1, choose.random() * 2)),
        reset=choose.random() < 0.5,
    )


# --------------------------------------------------------------------------- streams that stand still


def queued(served: Served, count: int) -> tuple[State, list[float]]:
    """So many open streams of which most wait for pages; then they leave. How long /health took meanwhile."""
    body = {"prompt": [7] * 2000, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with standing_still(served, post(body), count):
        _until(lambda: _open(served) >= count)
        looked_s = []
        end_s = time.monotonic() + TOGETHER_S
        while time.monotonic() < end_s:
            began_s = time.monotonic()
            served.health()
            looked_s.append(time.monotonic() - began_s)
            time.sleep(0.05)
        state = served.state()
    return state, looked_s


def unread(served: Served, count: int, tokens: int) -> tuple[State, State, list[float]]:
    """So many streams that nobody reads until all is generated: the server before and then.

    Also how long the answers of somebody who reads took meanwhile. The workers answer at once.
    """
    before = served.settled()
    body = {"prompt": [7] * 8, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with standing_still(served, post(body), count):
        _until(lambda: served.process.num_fds() > count)
        took_s = []
        while _open(served):
            short = post({**body, "max_tokens": 8})
            took_s.append(asyncio.run(ask(served.port, short)).seconds)
            time.sleep(0.05)
        assert took_s, "all had their tokens before anybody could look"
        state = served.state()
    return before, state, took_s


@contextlib.contextmanager
def standing_still(served: Served, request: bytes, count: int) -> Iterator[None]:
    """So many connections that have asked and never read."""
    with contextlib.ExitStack() as open_:
        for _ in range(count):
            open_.enter_context(stalled(served.port, request))
        yield


def _open(served: Served) -> int:
    """Requests that wait or run."""
    values = served.metrics()
    return int(values["num_requests_running"] + values["num_requests_waiting"])


def _until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        if time.monotonic() > deadline_s:
            raise SystemExit("the streams were not open within a minute")
        time.sleep(0.1)


# --------------------------------------------------------------------------- the report


def grown(states: Sequence[State]) -> list[Figure]:
    """What the second half of the requests left behind."""
    late = states[len(states) // 2 :]
    found = []
    for name, read in (
        ("memory of the server", lambda state: state.server_bytes),
        ("memory of the worker", lambda state: state.workers_bytes),
    ):
        values = [read(state) / MIB for state in states]
        points = [(float(i), read(state) / MIB) for i, state in enumerate(late)]
        detail = "MiB after each tenth: " + ", ".join(f"{value:.1f}" for value in values)
        found.append(
            Figure(f"{name}, drift of the second half", drift(points), "MiB", "flat", detail)
        )
    return found


def left(name: str, before: State, after: State, seconds: float) -> list[Figure]:
    """What clients that are gone left behind."""
    held = f"idle after {seconds:.2f} s; {after.running} running, {after.waiting} waiting"
    more = after.descriptors - before.descriptors
    grew = (after.server_bytes - before.server_bytes) / MIB
    return [
        Figure(f"{name}: KV pages held", after.pages, "", "0", held),
        Figure(f"{name}: descriptors more than before", more, "", "0", f"{after.descriptors} open"),
        Figure(f"{name}: memory more than before", grew, "MiB", "small", "of the server"),
    ]


def real(setup: Setup, count: int, choose: random.Random) -> tuple[list[Figure], dict[str, Any]]:
    """What takes a real worker."""
    with server(setup) as served:
        say(f"{count:,} requests, {AT_ONCE} at once")
        states = many(served, count, choose)
        clients = count // 10
        say(f"{clients:,} clients that leave")
        before, after, seconds = leaving(served, clients, choose)
        figures = [*grown(states), *left(f"{clients:,} clients that left", before, after, seconds)]
        say(f"{clients:,} streams that wait")
        full, looked_s = queued(served, clients)
        end = served.settled()
    detail = f"95 % within {percentile(looked_s, 95) * 1e3:.1f} ms; {full.descriptors} descriptors"
    name = f"{clients:,} open streams"
    held = full.running + full.waiting
    figures += [
        Figure(f"{name}: held", held, "", f"{clients}", f"{full.running} of them run"),
        Figure(f"{name}: /health, worst", max(looked_s) * 1e3, "ms", "", detail),
        *left(f"{name}, gone", after, end, 0.0),
    ]
    runs = {"many": states, "leaving": [before, after], "queued": [full, end]}
    return figures, {name: [asdict(state) for state in found] for name, found in runs.items()}


def instant(setup: Setup, count: int) -> tuple[list[Figure], dict[str, Any]]:
    """Streams that nobody reads, from workers that answer at once."""
    with server(setup, ("benchmarks.serving.instant", str(STEP_S))) as served:
        say(f"{count:,} streams that nobody reads")
        before, full, took_s = unread(served, count, UNREAD_TOKENS)
        end = served.settled()
    each = (full.server_bytes - before.server_bytes) / count / 1024
    worst = f"8 tokens meanwhile: median {statistics.median(took_s) * 1e3:.1f} ms"
    name = f"{count:,} streams that nobody reads"
    figures = [
        Figure(f"{name}: memory of each", each, "KiB", "bounded", f"{UNREAD_TOKENS:,} tokens each"),
        Figure(f"{name}: a reader's answer, worst", max(took_s) * 1e3, "ms", "", worst),
        *left(f"{name}, gone", before, end, 0.0),
    ]
    return figures, {"unread": [asdict(state) for state in (before, full, end)]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # this side's connections
    with tempfile.TemporaryDirectory(prefix="mnemoc-endurance.") as folder:
        work = Path(folder)
        figures, runs = real(small_setup(work), chosen.requests, random.Random(chosen.seed))
        more, more_runs = instant(small_setup(work / "roomy", 40_000), chosen.requests // 10)
    write_report("endurance", "What stays behind", [*figures, *more], {**runs, **more_runs})


if __name__ == "__main__":
    main()
