"""Workers killed at random moments, under load: what is lost, and how long until it goes on.

A real server (`mnemoc serve`) on each layout answers a crowd of streams, greedy and drawn; meanwhile one
worker after another, any rank, is killed with SIGKILL or stopped with SIGSTOP. Each stream must end with just
the tokens that its request gets alone, no token lost and none twice. Known: until `/health` is 503, or a
fresh worker is seen; ready: from then until `/health` is 200; recovered: from the signal until any stream
gets its next token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from mnemoc.runtime.server import bind

from .harness import SMALL_MODEL, Figure, make_model, make_plan, say, write_report
from .under_load import CONTEXT, MODEL, OUTPUT, invented_cluster

LAYOUTS = (
    "tp=1,spp=1,kvp=1",
    "tp=2,spp=2,kvp=1",
    "tp=1,spp=2,kvp=2,ffn=repeated",
    "tp=1,spp=1,kvp=2,ffn=helix",
)
STREAMS = 12
"""At a time."""
BODIES = 60
"""Different requests; each is asked many times."""
LARGER = {**SMALL_MODEL, "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 2816}
LARGER_LAYOUT = "tp=1,spp=2,kvp=1"
"""With 0.4 GB of weights, for the share that reading them has in a restart."""
STOPS, AGAIN = 0.15, 0.1
"""Of the signals, those that only stop a worker, and those that another one follows while they recover."""


class Lost(Exception):
    """A stream that did not end as it should."""


@dataclass
class Kill:
    """One worker lost. Seconds from the signal on."""

    layout: str
    rank: int
    stopped: bool
    again: bool
    streams: int
    detected_s: float = 0.0
    ready_s: float = 0.0
    recovered_s: float = 0.0


@dataclass
class Load:
    """What clients have seen. heard_s: when the latest token came to any of them"""

    completed: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    repeated: int = 0
    tokens: int = 0
    open: int = 0
    heard_s: float = 0.0
    over: bool = False


def make_bodies(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 4 to 600 tokens; every other request draws its tokens, one in four with penalties."""
    choose = random.Random(seed)
    bodies = []
    for i in range(count):
        length = choose.choice((choose.randrange(4, 60),) * 3 + (choose.randrange(60, 600),))
        body: dict[str, Any] = {
            "prompt": [choose.randrange(256) for _ in range(length)],
            "max_tokens": choose.randrange(20, OUTPUT),
            "ignore_eos": True,
            "temperature": 0,
            "logprobs": 0,
        }
        if i % 2:
            body |= {"temperature": 0.9, "top_p": 0.9, "seed": seed + i}
        if i % 4 == 3:
            body |= {"top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
        bodies.append(body)
    return bodies


@contextlib.asynccontextmanager
async def serving(
    plan: Path, model: Path
) -> AsyncIterator[tuple[httpx.AsyncClient, psutil.Process]]:
    """A server of its own, a client of it, and the parent of its workers."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    words = ["-m", "mnemoc", "serve", str(plan), "--weights", str(model), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    limits = httpx.Limits(max_connections=None)
    base = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as client:
            while await health(client) != 200:
                assert process.poll() is None, "the server does not start"
                await asyncio.sleep(0.1)
            (nursery,) = psutil.Process(process.pid).children()
            yield client, nursery
        process.terminate()
        assert process.wait(60) == 0, "the server ends in good order"
    finally:
        process.kill()


async def health(client: httpx.AsyncClient) -> int:
    try:
        return (await client.get("/health")).status_code
    except httpx.TransportError:
        return 0


async def ask(client: httpx.AsyncClient, body: dict[str, Any], load: Load) -> list[str]:
    """A stream's tokens. Raises Lost if it does not end as it should."""
    tokens: list[str] = []
    try:
        async with client.stream(
            "POST", "/v1/completions", json={**body, "stream": True}
        ) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return tokens
                event = json.loads(line[6:]) if line.startswith("data: ") else {"choices": []}
                if "error" in event:
                    raise Lost(event["error"]["message"])
                for choice in event["choices"]:
                    tokens += choice["logprobs"]["tokens"]
                    load.heard_s = time.monotonic()
    except httpx.TransportError as error:
        raise Lost(f"{type(error).__name__}: {error}") from error
    raise Lost(f"HTTP {answer.status_code}, {len(tokens)} tokens, no end")


async def client_of(
    client: httpx.AsyncClient,
    bodies: Sequence[dict[str, Any]],
    expected: Sequence[list[str]],
    load: Load,
    choose: random.Random,
) -> None:
    """One stream after the other, until the load is over."""
    while not load.over:
        i = choose.randrange(len(bodies))
        load.open += 1
        try:
            tokens = await ask(client, bodies[i], load)
        except Lost as lost:
            load.lost.append(f"request {i}: {lost}")
        else:
            load.completed += 1
            load.tokens += len(tokens)
            load.repeated += max(0, len(tokens) - len(expected[i]))
            if tokens != expected[i]:
                same = [a == b for a, b in zip(tokens, expected[i], strict=False)]
                at = same.index(False) if False in same else len(same)
                load.wrong.append(f"request {i}: token {at} of {len(expected[i])} differs")
        load.open -= 1


async def kill(
    client: httpx.AsyncClient,
    nursery: psutil.Process,
    load: Load,
    layout: str,
    choose: random.Random,
) -> Kill:
    """One worker is lost; returns when some stream goes on. Now and then another follows at once."""
    workers = sorted(nursery.children(), key=lambda worker: worker.pid)
    rank, stops = choose.randrange(len(workers)), choose.random() < STOPS
    again = choose.random() < AGAIN
    lost = Kill(layout, rank, stops, again, load.open)
    began_s = time.monotonic()
    workers[rank].send_signal(signal.SIGSTOP if stops else signal.SIGKILL)
    while await health(client) == 200 and set(nursery.children()) <= set(workers):
        await asyncio.sleep(0.005)
    lost.detected_s = (seen_s := time.monotonic()) - began_s
    if again:
        await asyncio.sleep(choose.uniform(0, 0.5))
        for worker in nursery.children()[:1]:
            worker.kill()
    while await health(client) != 200:
        await asyncio.sleep(0.005)
    lost.ready_s = time.monotonic() - seen_s
    while load.heard_s < seen_s:
        await asyncio.sleep(0.001)
    lost.recovered_s = load.heard_s - began_s
    return lost


async def run(
    plan: Path, model: Path, layout: str, count: int, seed: int, num_bodies: int
) -> tuple[list[Kill], Load, float]:
    """So many workers of a layout lost under load; the load; the share of pages in use afterwards."""
    choose = random.Random(f"{layout} {seed}")
    bodies, load, kills = make_bodies(num_bodies, seed), Load(), list[Kill]()
    async with serving(plan, model) as (client, nursery):
        expected = [await ask(client, body, Load()) for body in bodies]
        clients = [
            asyncio.create_task(client_of(client, bodies, expected, load, choose))
            for _ in range(STREAMS)
        ]
        while len(kills) < count:
            await asyncio.sleep(choose.uniform(0.05, 1.5))
            kills.append(await kill(client, nursery, load, layout, choose))
            last = kills[-1]
            say(
                f"  rank {last.rank} {'stopped' if last.stopped else 'killed'}: seen after "
                f"{last.detected_s:.2f} s, on again after {last.recovered_s:.2f} s"
            )
        load.over = True
        await asyncio.gather(*clients)
        text = (await client.get("/metrics")).text
    used = next(x for x in text.splitlines() if x.startswith("mnemoc:kv_cache_usage_perc{"))
    return kills, load, float(used.split()[-1])


def times(name: str, seconds: Sequence[float]) -> list[Figure]:
    """Median and worst."""
    detail = f"of {len(seconds)}"
    return [
        Figure(f"{name}, median", statistics.median(seconds), "s", "seconds", detail),
        Figure(f"{name}, worst", max(seconds), "s", "seconds", detail),
    ]


def measure(
    work: Path, name: str, layout: str, config: dict[str, int], count: int, bodies: int, seed: int
) -> tuple[list[Kill], Load, float]:
    """A model and a plan for it are made, served, and its workers lost."""
    say(name)
    cluster = invented_cluster(work / "invented.toml")
    model = make_model(work / f"{name}.model", **config)
    (model / "tokenizer.json").unlink()  # then a token is named by its id
    make_plan(work / name, model, cluster, layout, CONTEXT, OUTPUT)
    return asyncio.run(run(work / name, model, name, count, seed, bodies))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=28, help="of each layout")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    kills: list[Kill] = []
    loads: dict[str, Load] = {}
    pages: list[float] = []
    cases = [(layout, layout, MODEL, chosen.kills, BODIES) for layout in LAYOUTS]
    cases.append(("0.4 GB of weights", LARGER_LAYOUT, LARGER, -(-chosen.kills // 4), STREAMS))
    with tempfile.TemporaryDirectory(prefix="mnemoc-kills.") as folder:
        for case in cases:
            lost, load, used = measure(Path(folder), *case, chosen.seed)
            kills += lost
            loads[case[0]] = load
            pages.append(used)
    seen = loads.values()
    completed, tokens = sum(x.completed for x in seen), sum(x.tokens for x in seen)
    signals = len(kills) + sum(x.again for x in kills)
    how = f"{signals} workers lost in {len(cases)} runs, {sum(x.stopped for x in kills)} by SIGSTOP"
    asked = f"of {completed} streams with {tokens} tokens; {how}"
    alone = [x for x in kills if not x.again]
    killed = [x for x in alone if not x.stopped and x.layout in LAYOUTS]
    stopped = [x for x in alone if x.stopped and x.layout in LAYOUTS]
    larger = [x for x in alone if not x.stopped and x.layout not in LAYOUTS]
    figures = [
        Figure("requests lost", sum(len(x.lost) for x in seen), "", "0", asked),
        Figure("streams with a wrong token", sum(len(x.wrong) for x in seen), "", "0", asked),
        Figure("tokens repeated", sum(x.repeated for x in seen), "", "0", asked),
        Figure("pages in use afterwards", max(pages), "of all", "0", "the most, of all runs"),
        *times("SIGKILL: until it is known", [x.detected_s for x in killed]),
        *times("from then until fresh workers are ready", [x.ready_s for x in killed]),
        *times("SIGKILL: until the next token", [x.recovered_s for x in killed]),
        *times("SIGSTOP: until it is known", [x.detected_s for x in stopped]),
        *times("SIGSTOP: until the next token", [x.recovered_s for x in stopped]),
        *times("0.4 GB of weights: until fresh workers are ready", [x.ready_s for x in larger]),
        *times("0.4 GB of weights: until the next token", [x.recovered_s for x in larger]),
    ]
    runs = {"kills": [asdict(x) for x in kills], "loads": {k: asdict(x) for k, x in loads.items()}}
    write_report("kills", "Workers killed under load", figures, runs)


if __name__ == "__main__":
    main()
