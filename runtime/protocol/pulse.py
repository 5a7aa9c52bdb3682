"""The sign of life that a worker gives while it loads, computes or waits: for the engine to miss it.

A process that is stopped, swapped out or cut off gives none, and neither does one that never lets go of the
interpreter. One whose program hangs goes on giving it: the engine tells that by the step that does not end.
"""

from __future__ import annotations

import contextlib
import threading

import zmq

from .control import dial

BEAT_S = 0.5
"""Between two signs."""


def beating(name: str) -> bytes:
    """What a worker of this name calls itself for its pulse."""
    return f"{name}-pulse".encode()


class Pulse:
    """Beats in a thread of its own, over a socket of its own, while it is entered."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        control: str,
        name: str,
        secret: bytes | None,
    ) -> None:
        unsent = 1  # old signs are worth nothing
        self._socket = dial(context, control, beating(name).decode(), secret, unsent)
        self._socket.linger = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mnemoc-pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(zmq.Again):
                self._socket.send(b"", zmq.NOBLOCK)
            self._over.wait(BEAT_S)
        self._socket.close()
