"""Other people's benchmark clients, unmodified, against `mnemoc serve`: what they see, in their own words.

    python -m benchmarks.serving.clients guidellm=BIN [vllm=BIN] [aiperf=BIN]

also, where all of them ran, benchmarks/results/serving.{json,md}. BIN is the client's command;
docs/clients.md says how each is installed. The demo's model on one worker; all of them send the same load.
Nothing is downloaded: the tokenizer is the model's own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..harness import Figure, as_page, machine, say, write_report
from .server import Served, Setup, server, small_setup

REQUESTS, STREAMS = 40, 4
PROMPT, OUTPUT = 200, 32


@dataclass(frozen=True)
class Seen:
    """What a client says of its run. Times are medians."""

    completed: int
    failed: int
    ttft_ms: float
    itl_ms: float
    output_tokens_per_s: float


@dataclass(frozen=True)
class Client:
    """How a client is told what to do, and how it tells what it saw.

    arguments: from (server, its setup, a folder to write to); environment: beside the process's own
    """

    arguments: Callable[[Served, Setup, Path], Sequence[object]]
    read: Callable[[Path], Seen]
    environment: Callable[[Setup, Path], dict[str, str]] = lambda setup, folder: {}


def guidellm(served: Served, setup: Setup, out: Path) -> Sequence[object]:
    return (
        *("run", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={served.url}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={setup.model}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
        *("--output", f"kind=json,path={out / 'guidellm.json'}"),
        *("--output", "kind=console"),
    )


def read_guidellm(out: Path) -> Seen:
    metrics = json.loads((out / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    return Seen(
        totals["successful"],
        totals["errored"] + totals["incomplete"],
        metrics["time_to_first_token_ms"]["successful"]["median"],
        metrics["inter_token_latency_ms"]["successful"]["median"],
        metrics["output_tokens_per_second"]["successful"]["mean"],
    )


def vllm(served: Served, setup: Setup, out: Path) -> Sequence[object]:
    return (
        *("bench", "serve", "--disable-tqdm", "--ignore-eos"),
        *("--backend", "openai", "--base-url", served.url),
        *("--model", served.model, "--tokenizer", setup.model),
        *("--dataset-name", "random", "--random-input-len", PROMPT, "--random-output-len", OUTPUT),
        *("--num-prompts", REQUESTS, "--max-concurrency", STREAMS),
        *("--save-result", "--result-dir", out, "--result-filename", "vllm.json"),
    )


def read_vllm(out: Path) -> Seen:
    found = json.loads((out / "vllm.json").read_text())
    return Seen(
        found["completed"],
        REQUESTS - found["completed"],
        found["median_ttft_ms"],
        found["median_itl_ms"],
        found["output_throughput"],
    )


def aiperf(served: Served, setup: Setup, out: Path) -> Sequence[object]:
    return (
        *("profile", "--model", served.model, "--tokenizer", f"local/{served.model}"),
        *("--url", served.url, "--endpoint-type", "chat", "--streaming"),
        *("--synthetic-input-tokens-mean", PROMPT, "--synthetic-input-tokens-stddev", 0),
        *("--output-tokens-mean", OUTPUT, "--output-tokens-stddev", 0),
        *("--request-count", REQUESTS, "--concurrency", STREAMS),
        *("--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
        *("--ui", "none", "--artifact-dir", out / "aiperf"),
    )


def read_aiperf(out: Path) -> Seen:
    found = json.loads((out / "aiperf" / "profile_export_aiperf.json").read_text())
    failed: dict[str, Any] = found.get("error_request_count") or {"avg": 0}
    return Seen(
        int(found["request_count"]["avg"]),
        int(failed["avg"]),
        found["time_to_first_token"]["p50"],
        found["inter_token_latency"]["p50"],
        found["output_token_throughput"]["avg"],
    )


def as_cached(setup: Setup, out: Path) -> dict[str, str]:
    """The model's tokenizer where the Hugging Face hub would have put `local/NAME`."""
    home = out / "huggingface"
    kept = home / "hub" / f"models--local--{setup.model.name}"
    shutil.copytree(
        setup.model, kept / "snapshots" / "1", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1")
    return {"HF_HOME": str(home)}


CLIENTS = {
    "guidellm": Client(guidellm, read_guidellm),
    "vllm": Client(vllm, read_vllm),
    "aiperf": Client(aiperf, read_aiperf, as_cached),
}


def run(name: str, command: Path, served: Served, setup: Setup, out: Path) -> Seen:
    """The client's run; its own report goes to the terminal."""
    client = CLIENTS[name]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **client.environment(setup, out)}
    env.pop("PYTHONPATH", None)  # of this side
    words = [str(command), *map(str, client.arguments(served, setup, out))]
    say(" ".join(words))
    subprocess.run(words, env=env, cwd=out, check=True)
    return client.read(out)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("clients", nargs="+", metavar="NAME=BIN", help=", ".join(CLIENTS))
    asked = dict(word.split("=", 1) for word in options.parse_args().clients)
    figures, runs = [], {}
    with tempfile.TemporaryDirectory(prefix="mnemoc-clients.") as folder:
        work = Path(folder)
        setup = small_setup(work / "served")
        with server(setup) as served:
            for name, command in asked.items():
                out = work / name
                out.mkdir()
                seen = run(name, Path(command).absolute(), served, setup, out)
                runs[name] = asdict(seen)
                figures += [
                    Figure(f"{name}: requests failed", seen.failed, "", "0", f"of {REQUESTS}"),
                    Figure(f"{name}: time to first token", seen.ttft_ms, "ms", "", "median"),
                    Figure(f"{name}: time between tokens", seen.itl_ms, "ms", "", "median"),
                    Figure(f"{name}: output", seen.output_tokens_per_s, "tokens/s", "", "mean"),
                ]
    load = f"{REQUESTS} requests of {PROMPT} tokens in and {OUTPUT} out, {STREAMS} at once"
    title = f"Other people's clients: {load}"
    if runs.keys() == CLIENTS.keys():
        write_report("serving", title, figures, runs)
    else:
        say(as_page(title, figures, machine()))
    if any(run["failed"] or run["completed"] != REQUESTS for run in runs.values()):
        raise SystemExit("not every request was answered")


if __name__ == "__main__":
    main()
