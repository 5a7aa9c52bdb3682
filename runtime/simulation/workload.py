"""Invented traffic: classes of requests with lengths and rates, from a TOML file.

    qps = 1.0                                        # requests per second, of all classes together
    duration_s = 3600
    arrivals = { process = "poisson" }               # or gamma (cv), constant, bursts (size)

    [[class]]
    name = "chat"
    share = 0.95                                     # of the requests; shares need not add up to 1
    prompt = { distribution = "lognormal", median = 1730, p90 = 5696, most = 8191 }
    output = { distribution = "uniform", low = 16, high = 256 }    # or constant (tokens), empirical (values)
    most = 8192                                      # prompt and output together; the prompt gives way
    tbt_s = 0.05                                     # promises: ttft_s, tbt_s, priority; the plan's otherwise

Each class draws from generators of its own, seeded by the workload's seed and its place in the file: so the
same seed gives the same requests, and another rate the same lengths at other times.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInput
from ..request import Promise
from .draws import PROCESSES, Arriving, Constant, Empirical, Length, Lognormal, Uniform
from .traffic import LEAST_QPS, MOST_QPS, MOST_SECONDS, MOST_TOKENS, Arrival

SHIPPED = Path(__file__).parent / "workloads"
BLOCK = 1024
"""Requests of a class that are drawn together."""


@dataclass(frozen=True)
class Kind:
    """A class of requests. most: of prompt and output together, None: as they are drawn."""

    name: str
    share: float
    prompt: Length
    output: Length
    most: int | None
    promise: Promise
    arriving: Arriving


@dataclass(frozen=True)
class Workload:
    """Classes of requests that come for `duration_s` seconds at `qps` a second."""

    name: str
    qps: float
    duration_s: float
    kinds: tuple[Kind, ...]
    seed: int = 0

    def arrivals(self) -> Iterator[Arrival]:
        streams = [self._of(index) for index in range(len(self.kinds))]
        return heapq.merge(*streams, key=operator.attrgetter("time_s"))

    def where(self, index: int) -> str:
        return f"{self.name}, request {index + 1}"

    def at(self, qps: float) -> Workload:
        return dataclasses.replace(self, qps=qps)

    def _of(self, index: int) -> Iterator[Arrival]:
        """The requests of one class."""
        kind = self.kinds[index]
        rate = self.qps * kind.share / sum(kind.share for kind in self.kinds)
        seeds = np.random.SeedSequence(self.seed, spawn_key=(index,)).spawn(2)
        when, what = (np.random.default_rng(seed) for seed in seeds)
        begin_s = 0.0
        while True:
            times_s = begin_s + np.cumsum(kind.arriving.draw(when, BLOCK, rate))
            count = len(times_s)
            prompts, outputs = kind.prompt.draw(what, count), kind.output.draw(what, count)
            if kind.most is not None:
                prompts = np.clip(prompts, 1, kind.most - outputs)
            rows = zip(times_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
            for time_s, prompt, output in rows:
                if time_s > self.duration_s:
                    return
                yield Arrival(time_s, prompt, output, kind.name, kind.promise)
            begin_s = float(times_s[-1])


def shipped() -> tuple[str, ...]:
    """Names of the workloads that come with mnemoc."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def load_workload(name_or_path: str) -> Workload:
    """A shipped workload by name, or a TOML file. BadInput for whatever is not as above."""
    if name_or_path in shipped():
        return _read(SHIPPED / f"{name_or_path}.toml", name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise BadInput(
            "no such workload",
            got=name_or_path,
            do=f"give a TOML file or one of {', '.join(shipped())}",
        )
    return _read(path, str(path))


def _read(path: Path, name: str) -> Workload:
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadInput(f"cannot read: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise BadInput("not UTF-8 text", where=path) from error
    except ValueError as error:
        raise BadInput(f"not TOML: {error}", where=path) from error
    table = _Table(body, name)
    arriving = _arriving(table.table("arrivals", {"process": "poisson"}))
    kinds = table.tables("class")
    workload = Workload(
        name,
        table.number("qps", LEAST_QPS, MOST_QPS),
        table.number("duration_s", 1e-3, MOST_SECONDS),
        tuple(_kind(kind, arriving) for kind in kinds),
    )
    table.finish()
    names = [kind.name for kind in workload.kinds]
    if len(set(names)) < len(names):
        raise BadInput("two classes have the same name", where=name, got=names)
    return workload


def _kind(table: _Table, arriving: Arriving) -> Kind:
    name = table.text("name")
    prompt, output = (_length(table.table(side)) for side in ("prompt", "output"))
    ttft_s, tbt_s = (
        table.number(key, 1e-6, MOST_SECONDS) if key in table else None
        for key in ("ttft_s", "tbt_s")
    )
    priority = table.count("priority", -MOST_TOKENS) if "priority" in table else 0
    kind = Kind(
        name,
        table.number("share", 1e-9, 1e9),
        prompt,
        output,
        table.count("most") if "most" in table else None,
        Promise(ttft_s, tbt_s, priority),
        _arriving(table.table("arrivals")) if "arrivals" in table else arriving,
    )
    table.finish()
    if kind.most is not None and output.most >= kind.most:
        raise BadInput(
            "the longest output leaves no room for a prompt", where=f"{table.where} most"
        )
    return kind


def _length(table: _Table) -> Length:
    found: Length
    match table.text("distribution"):
        case "lognormal":
            median = table.number("median", 1, MOST_TOKENS)
            p90 = table.number("p90", median, MOST_TOKENS)
            most = table.count("most") if "most" in table else MOST_TOKENS
            found = Lognormal(median, p90, most)
        case "constant":
            found = Constant(table.count("tokens"))
        case "uniform":
            low = table.count("low")
            found = Uniform(low, table.count("high", low))
        case "empirical":
            found = Empirical(table.counts("values"))
        case other:
            raise BadInput(
                "no such distribution",
                where=table.where,
                got=other,
                do="write lognormal, constant, uniform or empirical",
            )
    table.finish()
    return found


def _arriving(table: _Table) -> Arriving:
    process = table.text("process")
    if process not in PROCESSES:
        raise BadInput(
            "no such process", where=table.where, got=process, do=f"one of {', '.join(PROCESSES)}"
        )
    cv = table.number("cv", 1e-3, 1e3) if process == "gamma" else 1.0
    size = table.count("size", most=10**6) if process == "bursts" else 1
    table.finish()
    return Arriving(process, cv, size)


class _Table:
    """A table of the file; what nobody has asked for by the end is an unknown key."""

    def __init__(self, body: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._left = dict(body)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def text(self, key: str) -> str:
        value = str(self._take(key, str, "a text"))
        if not value.isprintable():
            raise BadInput(f"{key} cannot be printed", where=self.where, got=value)
        return value

    def number(self, key: str, least: float, most: float) -> float:
        value = self._take(key, (int, float), "a number")
        if not least <= value <= most:  # NaN neither
            raise BadInput(
                f"{key} must lie between {least:g} and {most:g}", where=self.where, got=value
            )
        return float(value)

    def count(self, key: str, least: int = 1, most: int = MOST_TOKENS) -> int:
        return self._count(key, self._take(key, int, "a whole number"), least, most)

    def counts(self, key: str) -> tuple[int, ...]:
        values = self._take(key, list, "a list of whole numbers")
        if not values or any(type(value) is not int for value in values):
            raise BadInput(f"{key} must be whole numbers", where=self.where, got=values[:5])
        return tuple(self._count(key, value, 1, MOST_TOKENS) for value in values)

    def table(self, key: str, default: Mapping[str, Any] | None = None) -> _Table:
        if default is not None:
            self._left.setdefault(key, default)
        return _Table(self._take(key, dict, "a table"), f"{self.where} {key}")

    def tables(self, key: str) -> list[_Table]:
        found = self._take(key, list, f"tables [[{key}]]")
        if not found or any(not isinstance(one, dict) for one in found):
            raise BadInput(f"{key} must be tables [[{key}]]", where=self.where)
        return [_Table(one, f"{self.where} {key} {i + 1}") for i, one in enumerate(found)]

    def finish(self) -> None:
        if self._left:
            raise BadInput(f"unknown key {min(self._left)!r}", where=self.where)

    def _take(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        if key not in self._left:
            raise BadInput(f"{key!r} is missing", where=self.where)
        value = self._left.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadInput(f"{key} must be {what}", where=self.where, got=value)
        return value

    def _count(self, key: str, value: int, least: int, most: int) -> int:
        if not least <= value <= most:
            raise BadInput(
                f"{key} must lie between {least:,} and {most:,}", where=self.where, got=value
            )
        return value
