"""Runs sections: each a list of cases, each case one or several rows of figures, kept as soon as they exist.

A section's file OUT/<section>.json has its rows by case. A case that is there is not run again, so a run
that was cut short, or whose section ran out of its time, goes on where it stopped. A case that fails is
a row that says why, and the next one runs; a device that a fault has made unusable is another matter: the
process starts itself anew and goes on behind the case.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mnemoc.planner import CALIBRATED
from mnemoc.tiles import MeasuredTiles

from .device import Device, is_fatal
from .kernels import Kernels, Pool
from .sizes import Sizes

Figures = dict[str, Any]
"""One row of a table: column → text or number; None where there is none."""


@dataclass(frozen=True)
class Case:
    """key: its name in the section's file; run: measures it and returns its rows."""

    key: str
    run: Callable[[], list[Figures]]


class Setup:
    """What sections share: the device, the sizes, kernels that are compiled already, random K and V."""

    def __init__(
        self, device: Device, sizes: Sizes, out: Path, measured: MeasuredTiles | None = None
    ) -> None:
        """measured: tiles that go before the architecture's own."""
        arch = device.target.partition(":")[2]
        self.measured = measured or MeasuredTiles(arch, CALIBRATED, {}, {})
        self.tiles = device.tiles.refreshed(self.measured)
        self.device, self.sizes, self.out = device, sizes, out
        self.kernels = Kernels(tiles=self.tiles)
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """Random K and V that fill `pool_share` of the device's memory."""
        if self._pool is None:
            size = int(self.device.machine.memory_bytes * self.sizes.pool_share)
            self._pool = Pool(self.device, size)
        return self._pool

    def drop_pool(self) -> None:
        """Give its memory back: what comes needs the room."""
        self._pool = None
        self.device.release()

    @cached_property
    def ceilings(self) -> Mapping[str, float]:
        """Measured copy bandwidth (B/s) and product peaks (FLOP/s) of this run; empty if not measured."""
        rows = [row for rows in read(self.out, "ceilings").values() for row in rows]
        return {row["ceiling"]: row["rate"] for row in rows if "rate" in row}

    def share(self, rate: float, ceiling: str) -> float | None:
        """`rate` as a share of a measured ceiling."""
        return rate / self.ceilings[ceiling] if ceiling in self.ceilings else None


@dataclass(frozen=True)
class Section:
    """name: of its file; title: of its table; cases: what it measures, by importance."""

    name: str
    title: str
    cases: Callable[[Setup], Sequence[Case]]


def read(out: Path, section: str) -> dict[str, list[Figures]]:
    """Rows by case of a section's file; empty if there is none."""
    path = out / f"{section}.json"
    if not path.exists():
        return {}
    found: dict[str, list[Figures]] = json.loads(path.read_text())["cases"]
    return found


class Runner:
    """Runs sections within their budgets, and tells how far it is."""

    def __init__(self, setup: Setup, sections: Sequence[Section]) -> None:
        self.setup, self.sections = setup, sections
        self.started = time.monotonic()

    def run(self) -> int:
        """How many cases failed."""
        failed = 0
        for i, section in enumerate(self.sections):
            rest = sum(self.setup.sizes.budgets[later.name] for later in self.sections[i + 1 :])
            failed += self._run(section, rest)
        return failed

    def _run(self, section: Section, rest_s: float) -> int:
        out, budget_s = self.setup.out, self.setup.sizes.budgets[section.name]
        known = read(out, section.name)
        started = time.monotonic()
        cases = section.cases(self.setup)
        lacking: list[str] = []
        for done, case in enumerate(cases):
            if case.key in known:
                continue
            spent_s = time.monotonic() - started
            if spent_s > budget_s:
                lacking.append(case.key)
                continue
            left_s = max(0.0, budget_s - spent_s) + rest_s
            self._say(section, f"{case.key} ({done + 1} of {len(cases)})", left_s)
            known[case.key] = rows = _measured(case)
            self._write(section, known, cases, time.monotonic() - started)
            if any("fatal" in row for row in rows):
                _start_anew()
        if lacking:
            say(f"{section.name}: out of time before {', '.join(lacking)}; run again to go on")
        self._write(section, known, cases, time.monotonic() - started)
        self.setup.device.release()
        return sum("error" in row for rows in known.values() for row in rows)

    def _write(
        self,
        section: Section,
        known: Mapping[str, list[Figures]],
        cases: Sequence[Case],
        spent_s: float,
    ) -> None:
        body = {
            "section": section.name,
            "title": section.title,
            "machine": asdict(self.setup.device.machine),
            "seconds": round(spent_s, 1),
            "missing": [case.key for case in cases if case.key not in known],
            "cases": known,
        }
        path = self.setup.out / f"{section.name}.json"
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(body, indent=1) + "\n")
        aside.replace(path)

    def _say(self, section: Section, what: str, left_s: float) -> None:
        spent_s = time.monotonic() - self.started
        say(f"[{spent_s:4.0f} s, at most {left_s:.0f} s to go] {section.name}: {what}")


def _measured(case: Case) -> list[Figures]:
    try:
        with torch.inference_mode():
            return case.run()
    except Exception as error:
        say(traceback.format_exc())
        sentence = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return [{"error": sentence} | ({"fatal": True} if is_fatal(error) else {})]


def _start_anew() -> None:
    say("the device's context is lost: starting anew behind this case")
    words = [word for word in sys.argv[1:] if word != "--again"]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *words])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
