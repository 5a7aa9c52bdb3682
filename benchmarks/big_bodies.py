"""How long somebody else's stream stands still while a body of a million tokens is read.

A server as users start it, one stream of tokens, and beside it another process that posts one large body
after the other. Each is refused in the end, for its last token or its length, so that nothing but its
reading is measured: a prompt that is admitted slows decodes by plan, and that is another figure.

    python -m benchmarks.big_bodies
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .harness import Figure, make_model, mnemoc, percentile, say, write_report

TOKENS = 1_000_000
REPEATS = 5
AIM_S = 0.05
JSON = {"Content-Type": "application/json"}
STREAM = {"prompt": [1, 2, 3], "max_tokens": 30_000, "ignore_eos": True, "stream": True}


def bodies() -> Mapping[str, tuple[str, bytes]]:
    """Name → (path, body)."""
    source = random.Random(7)
    ids = [source.randrange(256) for _ in range(TOKENS)]
    words = "the quick brown fox jumps over the lazy dog. " * (TOKENS // 40)
    quotes = '{"a": "b\\c"}\n' * (TOKENS // 12)
    chat = {"messages": [{"role": "user", "content": words}]}
    return {
        "1 M token ids": ("/v1/completions", _json({"prompt": [*ids, 99999]})),
        "1.1 M characters of text": ("/v1/completions", _json({"prompt": words})),
        "1 M characters with many escapes": ("/v1/completions", _json({"prompt": quotes})),
        "a conversation of 1.1 M characters": ("/v1/chat/completions", _json(chat)),
        "/tokenize of 1.1 M characters": ("/tokenize", _json({"prompt": words})),
        "/detokenize of 1 M ids": ("/detokenize", _json({"tokens": ids})),
    }


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def post(port: int, path: str, body: bytes) -> tuple[int, float]:
    """The answer's status, and seconds from the first byte sent to the last one read."""
    began_s = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body, JSON)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, time.perf_counter() - began_s


@contextmanager
def serving() -> Iterator[int]:
    """A server's port."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        model = make_model(Path(folder) / "model", max_position_embeddings=2**20)
        promise = (
            "--context",
            "1000000",
            "--output-tokens",
            "30K",
            "--ttft",
            "99h",
            "--tbt",
            "60s",
        )
        cluster = ("--cluster", "local", "--no-calibrate", "--gpus", 1)
        mnemoc("plan", model, *cluster, *promise, "-o", f"{folder}/plan")
        free.close()
        words = ["serve", f"{folder}/plan", "--weights", str(model), "--port", str(port)]
        process = subprocess.Popen(
            [sys.executable, "-m", "mnemoc", *words], stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            assert any("serving on" in line for line in iter(process.stderr.readline, ""))
            yield port
        finally:
            process.terminate()
            process.communicate()


def gaps_beside(port: int, posting: multiprocessing.pool.AsyncResult[object] | None) -> list[float]:
    """Seconds between the events of a stream, while the bodies are posted; or for two seconds."""
    gaps = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", _json(STREAM), JSON)
    response = connection.getresponse()
    until_s = time.perf_counter() + 2
    last_s = None
    while (not posting.ready()) if posting else time.perf_counter() < until_s:
        line = response.readline()
        if line.startswith(b"data: {"):
            now_s = time.perf_counter()
            gaps += [] if last_s is None else [now_s - last_s]
            last_s = now_s
        elif line.startswith(b"data: [DONE]"):
            break
    connection.close()
    return gaps


def main() -> None:
    figures, runs = [], {}
    with serving() as port, multiprocessing.get_context("spawn").Pool(1) as pool:
        alone = gaps_beside(port, None)
        runs["nothing"] = {"worst_gap_s": max(alone), "median_gap_s": percentile(alone, 50)}
        say(f"alone: {runs['nothing']}")
        for name, (path, body) in bodies().items():
            worst, took, statuses = [], [], set()
            for _ in range(REPEATS):
                posted = pool.apply_async(post, (port, path, body))
                worst.append(max(gaps_beside(port, posted)))
                status, seconds = posted.get()
                took.append(seconds)
                statuses.add(status)
            runs[name] = {
                "bytes": len(body),
                "status": sorted(statuses),
                "took_s": took,
                "worst_gap_s": worst,
            }
            detail = (
                f"{len(body) / 1e6:.1f} MB, answered {sorted(statuses)} in {percentile(took, 50):.2f} s; "
                f"worst of {REPEATS}: {max(worst) * 1e3:.0f} ms; alone {max(alone) * 1e3:.0f} ms"
            )
            middle = percentile(worst, 50) * 1e3
            figures.append(Figure(name, middle, "ms", f"< {AIM_S * 1e3:.0f} ms", detail))
            say(f"{name}: {detail}")
    title = "The longest silence of a stream while another client's body is read"
    write_report("big_bodies", title, figures, runs)


if __name__ == "__main__":
    main()
