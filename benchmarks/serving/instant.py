"""`mnemoc serve` with workers that answer at once: what is left is the engine's thread and the event loop.

    python -m benchmarks.serving.instant STEP_S PLAN --weights MODEL --port PORT

The server is the real one to the last line but for `runtime.executor.workers.Workers`.
"""

from __future__ import annotations

import collections
import os
import select
import sys
import time
from pathlib import Path
from unittest import mock

from mnemoc.cli import main
from mnemoc.errors import MnemocError
from mnemoc.runtime.executor.workers import Down, Up
from mnemoc.runtime.protocol.messages import Admission, Done, Step

LETTERS = range(ord("a"), ord("z") + 1)


class InstantWorkers:
    """Each step is done `step_s` after it was sent; whoever wants a token gets the next letter."""

    step_s = 0.0

    def __init__(self, artifact: Path, weights: Path, world: int, nursery: object) -> None:
        self.up = False
        self._left: dict[int, int] = {}  # tokens of its prompt that are to come, by sequence
        self._due: collections.deque[tuple[float, Done]] = collections.deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def spawn(self) -> None:
        """Nothing starts: `poll` says that all are up."""

    def send(self, step: Step) -> None:
        for change in step.changes:
            if isinstance(change, Admission):
                self._left[change.id] = len(change.tokens) - change.cached
            elif isinstance(change, int):
                self._left.pop(change, None)
        tokens = [
            (sid, LETTERS[(token - LETTERS[0] + 1) % len(LETTERS)]) for sid, token in step.decodes
        ]
        for sid, rows in step.chunks:
            self._left[sid] -= rows
            if not self._left[sid]:
                tokens.append((sid, LETTERS[0]))
        done = Done(step.number, 0, tokens, (), self.step_s)
        self._due.append((time.monotonic() + self.step_s, done))

    def condemn(self, error: MnemocError) -> None:
        """Nobody here can hang."""
        raise error

    def wake(self) -> None:
        os.write(self._wake_write, b"\0")

    def poll(self, timeout_s: float | None) -> list[Done | Up | Down]:
        if not self.up:
            self.up = True
            return [Up()]
        wait_s = self._due[0][0] - time.monotonic() if self._due else timeout_s
        if select.select([self._wake_read], [], [], wait_s and max(0.0, wait_s))[0]:
            os.read(self._wake_read, 4096)
        done: list[Done | Up | Down] = []
        while self._due and self._due[0][0] <= time.monotonic():
            done.append(self._due.popleft()[1])
        return done

    def kill(self) -> None:
        self.up = False

    def close(self) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)


if __name__ == "__main__":
    InstantWorkers.step_s = float(sys.argv.pop(1))
    sys.argv.insert(1, "serve")
    with mock.patch("mnemoc.runtime.engine.Workers", InstantWorkers):
        main()
