"""A forecast as text: figures with bands, what they are made of, what they rest on."""

from __future__ import annotations

from collections.abc import Iterator

from ..units import format_bytes, format_count, format_duration
from ..wording import dtypes, growth_words, memory_parts
from .configuration import Configuration
from .evidence import Estimate
from .forecast import Forecast

_FEW = 6  # chunk sizes that are named


def tell(model: str, cluster: str, asked: Configuration, said: Forecast) -> Iterator[str]:
    """Line by line, for a terminal of 110 columns."""
    where = f"tp={asked.layout.tp} cp={asked.cp}" if asked.cp > 1 else str(asked.layout)
    after = f" after {format_count(asked.cached)} cached" if asked.cached else ""
    yield f"{model} on {cluster}: {where}, {asked.ranks} devices"
    yield (
        f"{format_count(asked.prompt)} tokens of prompt{after}, "
        f"{format_count(asked.output)} of output, {asked.concurrency} at once, "
        f"{dtypes(said.dtype, asked.precision)}"
    )
    yield ""
    yield from _figure("TTFT", said.ttft)
    yield from _figure("TBT", said.tbt)
    yield f"  decode  {said.throughput_tokens_per_s:,.1f} tokens/s"
    held = said.memory
    parts = [f"{name} {format_bytes(size)}" for name, size in memory_parts(held).items()]
    filled = f"{format_bytes(held.used_bytes)} of {format_bytes(held.capacity_bytes)}"
    yield f"  memory  {filled} on the fullest rank, most in {held.step}:"
    yield f"          {', '.join(parts)}"
    yield f"  chunks  {_chunks(said)}"
    if asked.layout.kvp > 1:
        tokens = asked.tokens + asked.output
        yield f"  growth  a request {growth_words(asked.layout.kvp, said.stripe_tokens, tokens)}"
    if said.overlap_rows:
        yield f"  halves  chunks of {said.overlap_rows:,} rows or more, one's messages beside the other"
    if said.one_shot_rows:
        yield f"  sums    of up to {said.one_shot_rows:,} rows over tp in one shot, NCCL's above"
    yield ""
    yield "rests on"
    for use in said.uses:
        whole = said.ttft if use.figure == "ttft" else said.tbt
        share = whole.parts_s[use.part] / whole.seconds
        if share >= 0.005:
            name = f"{use.figure.upper()} {use.part}"
            yield f"  {name:<19} {share:>4.0%}  ±{use.band:.0%}  {use.words}; {_short(use.source)}"
    for note in said.notes:
        yield f"note: {note}"


def _figure(name: str, figure: Estimate) -> Iterator[str]:
    between = f"{format_duration(figure.low_s)} to {format_duration(figure.high_s)}"
    parts = sorted(figure.parts_s.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{part} {s / figure.seconds:.0%}" for part, s in parts if s > 0)
    yield f"  {name:<6}  {format_duration(figure.seconds)}  ({between})  {shares}"


def _chunks(said: Forecast) -> str:
    named = [f"{format_count(size)} from {format_count(start)}" for start, size in said.chunks]
    if len(named) > _FEW:
        named = [*named[: _FEW - 2], "…", named[-1]]
    return ", ".join(named)


def _short(source: str) -> str:
    """A source in one line."""
    return source if len(source) <= 72 else f"{source[:71]}…"
