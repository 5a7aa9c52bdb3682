"""Recorded traffic, line by line. What kind of file it is, its first line says:

    {"time_s": 0.5, "prompt_tokens": 812, "output_tokens": 64}          ours; also "class", "ttft_s",
                                                                         "tbt_s", "priority", "blocks"
    TIMESTAMP,ContextTokens,GeneratedTokens                              Azure's LLM inference traces
    {"timestamp": 500, "input_length": 812, "output_length": 64,         Mooncake's, in milliseconds
     "hash_ids": [46, 47]}

"blocks" and "hash_ids" name the prompt's blocks of 512 tokens (see `traffic.Arrival`). A trace that is
broken anywhere is refused with the line's number: results of half a trace would look like those of one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from ...errors import BadInput
from ..request import Promise
from .traffic import MOST_SECONDS, MOST_TOKENS, NO_PROMISE, Arrival

BLOCK_TOKENS = 512
LINE_BYTES = 16 << 20
"""A line is no longer: more is not a trace."""

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
OURS = {"time_s", "prompt_tokens", "output_tokens"}
OURS_TOO = {"class", "ttft_s", "tbt_s", "priority", "blocks"}
MOONCAKE = {"timestamp", "input_length", "output_length"}
MOONCAKE_TOO = {"hash_ids"}

Reader = Callable[["Line"], Arrival]


@dataclass(frozen=True)
class Trace:
    """A trace file. stretch: times are multiplied by it; duration_s: only what comes until then."""

    path: Path
    stretch: float = 1.0
    duration_s: float = math.inf

    @property
    def name(self) -> str:
        return str(self.path)

    def arrivals(self) -> Iterator[Arrival]:
        """BadInput with the line's number for anything that is not as it should be."""
        last_s = 0.0
        for line, read in self._lines():
            arrival = read(line)
            if arrival.time_s < last_s:
                raise line.wrong(
                    "a request comes before the one above it",
                    got=arrival.time_s,
                    do="sort the trace by time",
                )
            last_s = arrival.time_s
            if self.stretch != 1.0:
                arrival = dataclasses.replace(arrival, time_s=last_s * self.stretch)
            if arrival.time_s > self.duration_s:
                return
            yield arrival

    def where(self, index: int) -> str:
        first = next(line.number for line, _ in self._lines())
        return f"{self.path}, line {first + index}"

    def at(self, qps: float) -> Trace:
        """Stretched or compressed in time, so that `qps` requests come in a second on average."""
        requests, last_s = 0, 0.0
        for arrival in dataclasses.replace(self, duration_s=math.inf).arrivals():
            requests, last_s = requests + 1, arrival.time_s
        if last_s == 0:
            raise BadInput("all requests come at once: there is no rate to change", where=self.path)
        return dataclasses.replace(self, stretch=self.stretch * requests / last_s / qps)

    def _lines(self) -> Iterator[tuple[Line, Reader]]:
        """Each request's line, and what reads it. An empty line is one too many, but at the end."""
        read: Reader | None = None
        empty = 0
        try:
            with self.path.open("rb") as file:
                for number in range(1, MOST_TOKENS):
                    raw = file.readline(LINE_BYTES)
                    if not raw:
                        break
                    line = Line(self.path, number, self._text(raw, number))
                    if not line.text:
                        empty = empty or number
                        continue
                    if empty:
                        raise Line(self.path, empty, "").wrong("an empty line", do="remove it")
                    if read is None:
                        read = _recognise(line)
                        if line.text == AZURE:
                            continue
                    yield line, read
        except OSError as error:
            raise BadInput(f"cannot read: {error.strerror}", where=self.path) from error
        if read is None:
            raise BadInput("the trace is empty", where=self.path)

    def _text(self, raw: bytes, number: int) -> str:
        if len(raw) == LINE_BYTES:
            raise Line(self.path, number, "").wrong(
                f"a line of more than {LINE_BYTES >> 20} MiB", do="write one request to a line"
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(
                "not UTF-8 text",
                where=f"{self.path}, line {number}",
                do="save it as UTF-8, uncompressed",
            ) from error
        return text.strip()


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a trace, for reading it and for saying where something is wrong."""

    path: Path
    number: int
    text: str

    def wrong(self, what: str, *, got: object = None, do: str | None = None) -> BadInput:
        """The error that says what is wrong with it."""
        return BadInput(what, where=f"{self.path}, line {self.number}", got=got, do=do)

    def count(self, value: object, name: str, least: int = 1) -> int:
        """A whole number of tokens."""
        if type(value) is not int:
            raise self.wrong(f"{name} is not a whole number", got=value)
        if not least <= value <= MOST_TOKENS:
            raise self.wrong(f"{name} must lie between {least} and {MOST_TOKENS:,}", got=value)
        return value

    def seconds(self, value: object, name: str, scale: float = 1.0) -> float:
        """A finite number that is not negative, in units of `scale` seconds."""
        if type(value) is not float and type(value) is not int:
            raise self.wrong(f"{name} is not a number", got=value)
        if not 0 <= value * scale <= MOST_SECONDS:  # NaN neither
            raise self.wrong(f"{name} must be 0 or more, and less than 30 years", got=value)
        return float(value) * scale

    def blocks(self, value: object, name: str, prompt: int) -> tuple[int, ...]:
        """Ids of the prompt's blocks; the last one, if it is a part, may be missing."""
        if not isinstance(value, list):
            raise self.wrong(f"{name} is not a list of block ids", got=value)
        if any(type(id) is not int or not 0 <= id < 1 << 64 for id in value):
            raise self.wrong(f"{name} holds something that is no block id, a whole number from 0")
        if value and len(value) not in (prompt // BLOCK_TOKENS, -(-prompt // BLOCK_TOKENS)):
            raise self.wrong(
                f"{name} must name each block of {BLOCK_TOKENS} tokens of the prompt, "
                f"{-(-prompt // BLOCK_TOKENS)} in all",
                got=len(value),
            )
        return tuple(value)

    def fields(self, needed: set[str], optional: set[str]) -> dict[str, Any]:
        """The line's JSON object."""
        found = self.json()
        keys = found.keys()
        if not needed <= keys:
            raise self.wrong(f"{min(needed - keys)!r} is missing")
        if not keys <= needed | optional:
            raise self.wrong(
                f"unknown key {min(keys - needed - optional)!r}",
                do=f"known keys: {', '.join(sorted(needed | optional))}",
            )
        return found

    def json(self) -> dict[str, Any]:
        try:
            found = json.loads(
                self.text, object_pairs_hook=self._unique, parse_constant=self._no_number
            )
        except (ValueError, RecursionError) as error:
            raise BadInput(
                "not a JSON object", where=f"{self.path}, line {self.number}", got=self.text[:60]
            ) from error
        if not isinstance(found, dict):
            raise self.wrong("not a JSON object", got=self.text[:60])
        return found

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise self.wrong(
                f"key {next(n for n in names if names.count(n) > 1)!r} stands there twice"
            )
        return found

    def _no_number(self, text: str) -> NoReturn:
        raise self.wrong(f"{text} is no number to simulate with")


def _recognise(line: Line) -> Reader:
    """What reads the lines of a file that begins with this one."""
    if line.text == AZURE:
        return _Azure()
    if line.text.startswith("{"):
        keys = line.json().keys()
        if "time_s" in keys:
            return _ours
        if "timestamp" in keys:
            return _mooncake
        raise line.wrong(
            "neither 'time_s' nor 'timestamp' is there",
            do='write {"time_s": 0.5, "prompt_tokens": 812, "output_tokens": 64}',
        )
    raise line.wrong(
        "not a trace of a known kind",
        got=line.text[:60],
        do=f"give our JSONL, Mooncake's JSONL, or a CSV with the header {AZURE}",
    )


def _ours(line: Line) -> Arrival:
    found = line.fields(OURS, OURS_TOO)
    prompt = line.count(found["prompt_tokens"], "prompt_tokens")
    kind = found.get("class", "")
    if not isinstance(kind, str) or not kind.isprintable():
        raise line.wrong("class is not a text that can be printed", got=kind)
    promise = NO_PROMISE
    if not found.keys().isdisjoint(("ttft_s", "tbt_s", "priority")):
        priority = found.get("priority", 0)
        if type(priority) is not int:
            raise line.wrong("priority is not a whole number", got=priority)
        promise = Promise(
            _promised(line, found, "ttft_s"), _promised(line, found, "tbt_s"), priority
        )
    return Arrival(
        line.seconds(found["time_s"], "time_s"),
        prompt,
        line.count(found["output_tokens"], "output_tokens"),
        kind,
        promise,
        line.blocks(found["blocks"], "blocks", prompt) if "blocks" in found else (),
        BLOCK_TOKENS,
    )


def _promised(line: Line, found: dict[str, Any], name: str) -> float | None:
    if name not in found:
        return None
    seconds = line.seconds(found[name], name)
    if seconds == 0:
        raise line.wrong(f"{name} must be more than 0", got=0)
    return seconds


def _mooncake(line: Line) -> Arrival:
    found = line.fields(MOONCAKE, MOONCAKE_TOO)
    prompt = line.count(found["input_length"], "input_length")
    return Arrival(
        line.seconds(found["timestamp"], "timestamp", 1e-3),
        prompt,
        line.count(found["output_length"], "output_length"),
        blocks=line.blocks(found.get("hash_ids", []), "hash_ids", prompt),
        block_tokens=BLOCK_TOKENS,
    )


class _Azure:
    """Rows of Azure's CSV: of 2023 without, of 2024 with a time zone. Time counts from the first row."""

    def __init__(self) -> None:
        self._begin: datetime | None = None

    def __call__(self, line: Line) -> Arrival:
        fields = line.text.split(",")
        if len(fields) != 3:
            raise line.wrong(f"{len(fields)} fields in place of three", got=line.text[:60])
        return Arrival(
            self._time_s(line, fields[0]),
            self._count(line, fields[1], "ContextTokens"),
            self._count(line, fields[2], "GeneratedTokens"),
        )

    def _time_s(self, line: Line, text: str) -> float:
        try:
            time = datetime.fromisoformat(text)
            self._begin = self._begin or time
            return (time - self._begin).total_seconds()
        except (ValueError, TypeError) as error:  # a TypeError: only some rows have a time zone
            what = "TIMESTAMP is not such a time as the rows above have"
            raise line.wrong(what, got=text) from error

    def _count(self, line: Line, text: str, name: str) -> int:
        return line.count(
            int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text, name
        )
