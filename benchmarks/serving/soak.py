"""Hours of use in little: a mixed load for some minutes, and whether anything grows or fails.

    python -m benchmarks.serving.soak --minutes 20      also benchmarks/results/soak.{json,md}

Short answers and streams, some of them with several answers, stop strings or logprobs; long prompts;
clients that leave at any moment, and those that send half a body or nonsense. Greedy answers are held against
what the same prompts got from the idle server at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..harness import Figure, percentile, say, write_report
from .client import Reply, ask, leave, post
from .server import Served, State, server, small_setup

RATE = 2.0
"""Requests a second, on average: about a third of a core on the demo's model."""
SAMPLE_S = 10
KNOWN = [f"what a soak asks again and again, number {i}" for i in range(8)]
GREEDY = {"temperature": 0, "ignore_eos": True}
BAD: Sequence[tuple[object, str, int]] = (
    (b"{nope", "/v1/completions", 400),
    ({"prompt": [1], "colour": "red"}, "/v1/completions", 400),
    ({"prompt": [1] * 20_000}, "/v1/completions", 400),
    ({"prompt": "a", "temperature": 9}, "/v1/completions", 400),
    ({"prompt": "a", "model": "another"}, "/v1/completions", 404),
    ({"messages": []}, "/v1/chat/completions", 400),
    ({}, "/v1/nothing", 404),
)


@dataclass(frozen=True)
class Sample:
    """The server at one moment. at_s: since the start"""

    at_s: float
    state: State


@dataclass
class Soak:
    """What is asked, what came of it, and what was seen meanwhile."""

    served: Served
    choose: random.Random
    expected: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    ttft_s: list[tuple[float, float]] = field(default_factory=list)  # (since the start, value)
    tbt_s: list[tuple[float, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    began_s: float = 0.0

    async def run(self, seconds: float) -> None:
        for prompt in KNOWN:
            reply = await ask(
                self.served.port, post({"prompt": prompt, "max_tokens": 24, **GREEDY})
            )
            self.expected[prompt] = reply.json["choices"][0]["text"]
        self.began_s = time.monotonic()
        watching = asyncio.create_task(self._watch())
        asked: set[asyncio.Task[None]] = set()
        kinds: list[Callable[[], Any]] = [
            *(self.known,) * 8,
            *(self.stream,) * 6,
            *(self.several,) * 2,
            *(self.leaver,) * 3,
            *(self.half_body,) * 1,
            *(self.bad,) * 2,
        ]
        next_long_s = 0.0
        while (now_s := time.monotonic() - self.began_s) < seconds:
            kind = self.choose.choice(kinds)
            if now_s > next_long_s:
                kind, next_long_s = self.long, now_s + 30
            task = asyncio.create_task(self._guarded(kind))
            asked.add(task)
            task.add_done_callback(asked.discard)
            await asyncio.sleep(self.choose.expovariate(RATE))
        await asyncio.gather(*asked)
        watching.cancel()

    async def _guarded(self, kind: Callable[[], Any]) -> None:
        self.counts[kind.__name__] += 1
        try:
            async with asyncio.timeout(120):
                await kind()
        except (AssertionError, OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
            self.errors.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            say(self.errors[-1])

    async def _watch(self) -> None:
        while True:
            state = await asyncio.to_thread(self.served.state)
            self.samples.append(Sample(time.monotonic() - self.began_s, state))
            await asyncio.sleep(SAMPLE_S)

    # ------------------------------------------------------------------------- what clients do

    async def known(self) -> None:
        """An answer that is known, whole or streamed."""
        prompt, streamed = self.choose.choice(KNOWN), self.choose.random() < 0.5
        body = {"prompt": prompt, "max_tokens": 24, "stream": streamed, **GREEDY}
        reply = await ask(self.served.port, post(body))
        if streamed:
            text = self._streamed(reply)
        else:
            assert reply.status == 200, reply.content
            text = reply.json["choices"][0]["text"]
        assert text == self.expected[prompt], "another answer than at the start"

    async def stream(self) -> None:
        """A conversation, streamed, sampled."""
        body = {
            "messages": [{"role": "user", "content": self._text(40, 400)}],
            "max_tokens": self.choose.randrange(8, 64),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": self.choose.random() < 0.2,
        }
        reply = await ask(self.served.port, post(body, "/v1/chat/completions"))
        self._streamed(reply)
        got = reply.events[-1]["usage"]["completion_tokens"]
        assert got == body["max_tokens"], f"{got} tokens of {body['max_tokens']}"
        at_s, ttft_s = time.monotonic() - self.began_s, reply.ttft_s or 0.0
        self.ttft_s.append((at_s, ttft_s))
        self.tbt_s.append((at_s, (reply.seconds - ttft_s) / (got - 1)))

    async def several(self) -> None:
        """Several prompts and answers, with a stop string that may or may not come."""
        prompts = [self._text(5, 80) for _ in range(2)]
        body = {"prompt": prompts, "n": 2, "max_tokens": 16, "stop": ["e", "a"], "temperature": 1.2}
        reply = await ask(self.served.port, post(body))
        assert reply.status == 200, reply.content
        assert len(reply.json["choices"]) == 4

    async def long(self) -> None:
        ids = [self.choose.randrange(256) for _ in range(self.choose.randrange(2000, 8000))]
        body = {"prompt": ids, "max_tokens": 16, "ignore_eos": True, "stream": True}
        self._streamed(await ask(self.served.port, post(body)))

    async def leaver(self) -> None:
        """Goes away before, within or after the prefill."""
        size = self.choose.choice((50, 50, 3000))
        body = {"prompt": [5] * size, "max_tokens": 200, "ignore_eos": True, "stream": True}
        after_s, reset = self.choose.random() * 0.5, self.choose.random() < 0.5
        await leave(self.served.port, post(body), after_s=after_s, reset=reset)

    async def half_body(self) -> None:
        request = post({"prompt": self._text(100, 400)})
        part = request[: self.choose.randrange(10, len(request))]
        await leave(self.served.port, part, after_s=self.choose.random(), reset=False)

    async def bad(self) -> None:
        body, path, status = self.choose.choice(BAD)
        reply = await ask(self.served.port, post(body, path))
        assert reply.status == status, f"{path}: {reply.status} for {str(body)[:60]}"
        assert reply.json["error"]["message"]

    def _streamed(self, reply: Reply) -> str:
        assert reply.status == 200, reply.content
        assert reply.done, "a stream without its end"
        choices = [choice for event in reply.events for choice in event["choices"]]
        assert choices[-1]["finish_reason"] == "length"
        return "".join(choice.get("text", "") for choice in choices)

    def _text(self, least: int, most: int) -> str:
        length = self.choose.randrange(least, most)
        return "".join(self.choose.choices("abcdefgh ", k=length))


def drift(points: Sequence[tuple[float, float]]) -> float:
    """By how much the straight line through the points rises from their first to their last."""
    if len(points) < 2:
        return 0.0
    times, values = zip(*points, strict=True)
    slope = statistics.linear_regression(times, values).slope
    return float(slope) * (times[-1] - times[0])


def medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of each minute's values: a few slow ones say nothing of a drift."""
    minutes: dict[int, list[float]] = {}
    for at_s, value in points:
        minutes.setdefault(int(at_s // 60), []).append(value)
    return [
        (60.0 * minute, statistics.median(values)) for minute, values in sorted(minutes.items())
    ]


def figures(soak: Soak, end: State) -> list[Figure]:
    """Errors, what is left at the end, and drifts in the second half: caches and rings fill in the first."""
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(soak.counts.items()))
    held = f"{end.running} running, {end.waiting} waiting"
    found = [
        Figure(
            "errors", len(soak.errors), "", "0", f"of {soak.counts.total():,} requests: {counts}"
        ),
        Figure("KV pages held at the end", end.pages, "", "0", held),
    ]
    warm = soak.samples[len(soak.samples) // 2 :]
    minutes = (warm[-1].at_s - warm[0].at_s) / 60
    for name, unit, scale, value in (
        ("memory of the server", "MiB", 2**20, lambda state: state.server_bytes),
        ("memory of the worker", "MiB", 2**20, lambda state: state.workers_bytes),
        ("descriptors of the server", "", 1, lambda state: state.descriptors),
    ):
        points = [(sample.at_s, value(sample.state) / scale) for sample in warm]
        first, last = points[0][1], points[-1][1]
        detail = (
            f"drift over {minutes:.0f} min; {first:.4g} {unit} at first, {last:.4g} {unit} at last"
        )
        found.append(Figure(name, drift(points), unit, "flat", detail))
    for name, times in (("time to first token", soak.ttft_s), ("time between tokens", soak.tbt_s)):
        late = [(at_s, 1e3 * value) for at_s, value in times if at_s >= warm[0].at_s]
        values = [value for _, value in late]
        detail = (
            f"drift of the medians of minutes; median {statistics.median(values):.4g} ms, 95 % within "
            f"{percentile(values, 95):.4g} ms, {len(values)} streams"
        )
        found.append(Figure(name, drift(medians(late)), "ms", "flat", detail))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="mnemoc-soak.") as folder,
        server(small_setup(Path(folder))) as served,
    ):
        soak = Soak(served, random.Random(chosen.seed))
        asyncio.run(soak.run(chosen.minutes * 60))
        end = served.settled()
    runs = {
        "errors": soak.errors,
        "samples": [{"at_s": sample.at_s, **asdict(sample.state)} for sample in soak.samples],
        "ttft_s": soak.ttft_s,
        "tbt_s": soak.tbt_s,
    }
    title = f"{chosen.minutes:g} minutes of mixed load"
    write_report("soak", title, figures(soak, end), runs)


if __name__ == "__main__":
    main()
