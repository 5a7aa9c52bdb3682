"""One prompt through a plan, as the terminal sees it: text as it comes, then measured against predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .artifact import Manifest
from .console import Progress
from .folder import load_artifact
from .runtime import Engine, Handle, Request, Sampling, Token
from .runtime.loader import ArtifactModules
from .runtime.scheduling.cost import Load, PlanCost, PrefillTime
from .runtime.scheduling.growth import Growth
from .runtime.tokenizer import Detokenizer, Tokenizer
from .units import format_duration


@dataclass(frozen=True)
class Timing:
    """Seconds to the first token, and between tokens (median); None where there was only one."""

    ttft_s: float
    tbt_s: float | None


@dataclass(frozen=True)
class Outcome:
    """What a prompt gave. predicted: by the plan's cost function, for this very prompt alone."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    measured: Timing
    predicted: Timing
    promised: Timing


def run_prompt(
    directory: Path,
    weights: Path,
    prompt: str,
    max_tokens: int,
    sampling: Sampling,
    *,
    write: Callable[[str], None],
    progress: Progress,
    trace_out: Path | None = None,
) -> Outcome:
    """Start the plan's workers, run the prompt, hand text to `write` as it becomes certain."""
    manifest, contents = load_artifact(directory)
    tokenizer = Tokenizer(weights)
    request = Request(tokenizer.encode(prompt), max_tokens, sampling)
    cost = PlanCost(ArtifactModules(directory, contents, ["cost.py"]).load("cost"))
    text = Detokenizer(tokenizer)
    pieces = []

    def take(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    with Engine.start(directory, weights, progress=progress, trace_out=trace_out) as engine:
        handle = engine.submit(request)
        for event in handle.events():
            if isinstance(event, Token):
                progress("decoding", event.index / max_tokens)
                take(text.push(event.id))
            else:
                progress(
                    f"prefilling {event.total:,} tokens", event.done / event.total, event.eta_s
                )
        take(text.rest())
    prompt_tokens = len(request.prompt_ids)
    return Outcome(
        text="".join(pieces),
        tokens=tuple(handle.tokens),
        prompt_tokens=prompt_tokens,
        finish_reason=str(handle.finish_reason),
        measured=_measured(handle),
        predicted=predict(manifest, cost, prompt_tokens, len(handle.tokens)),
        promised=Timing(manifest.workload.ttft_s, manifest.workload.tbt_s),
    )


def predict(manifest: Manifest, cost: PlanCost, prompt: int, output: int) -> Timing:
    """What the plan's cost function says of one request that has the engine to itself.

    TTFT = Σ over chunks of the pipeline's pace, plus the last chunk's way through the other stages;
    TBT = a decode's way through all stages, half way through the output.
    """
    plan = manifest.plan
    growth = Growth.of(plan)
    before = max(0, prompt - plan.chunk_at(prompt - 1))
    chunks, decodes = [], []
    for shard in range(growth.seen_by(prompt + output)):
        chunk, decode = Load(), Load()
        chunk.add_chunk(growth, shard, before, prompt - before, ends=True)
        decode.add_decode(growth, shard, prompt + output // 2)
        chunks.append(chunk)
        decodes.append(decode)
    fill_s = max(cost.crossing_s(load) - cost.pace_s(load) for load in chunks)
    prefill = PrefillTime(plan, cost, growth, prompt, points=1024)
    tbt_s = max(map(cost.crossing_s, decodes)) if output > 1 else None
    return Timing(prefill.until_s(prompt) + fill_s, tbt_s)


def _measured(handle: Handle) -> Timing:
    assert handle.ttft_s is not None, "the request ended without a token and without an error"
    return Timing(handle.ttft_s, statistics.median(handle.tbt_s) if handle.tbt_s else None)


def summary(outcome: Outcome) -> str:
    """Measured against predicted, in a line for each promise."""
    lines = [f"{outcome.prompt_tokens:,} prompt tokens, {len(outcome.tokens):,} generated"]
    for name, what in (("ttft_s", "time to first token"), ("tbt_s", "time between tokens")):
        measured, predicted, promised = (
            getattr(timing, name)
            for timing in (outcome.measured, outcome.predicted, outcome.promised)
        )
        if measured is None:
            continue
        error = predicted / measured - 1
        lines.append(
            f"{what}: {format_duration(measured)} measured, {format_duration(predicted)} predicted "
            f"({error:+.0%}), {format_duration(promised)} promised"
        )
    return "\n".join(lines)
