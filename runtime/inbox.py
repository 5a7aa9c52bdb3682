"""What other threads tell the engine's own, in the order in which they do, until it ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from ..errors import MnemocError
from .request import Handle
from .telemetry.snapshot import Look

Message = Handle | Look | int | MnemocError
"""A request, a wish for a snapshot, a request to cancel by its id, or why the engine is to end."""


class Inbox:
    """wake: called when there is something to read; closed: why nothing is taken any more, if so"""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.closed: MnemocError | None = None
        self._wake = wake
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._come: list[Handle] = []  # requests that have been read, and not yet accepted
        self._lock = threading.Lock()

    def put(self, message: Message) -> bool:
        """From any thread; False if it is closed."""
        with self._lock:
            if self.closed is not None:
                return False
            self._messages.put(message)
            self._wake()
            return True

    def close(self, why: MnemocError) -> None:
        with self._lock:
            self.closed = why

    def read(self) -> Iterator[list[Handle] | Look | int | MnemocError]:
        """All that has come: requests together, up to a message that may be about them. They count as
        accepted when the next message is asked for."""
        while not self._messages.empty():
            message = self._messages.get()
            if isinstance(message, Handle):
                self._come.append(message)
                continue
            if self._come:
                yield self._come
                self._come.clear()
            yield message
        if self._come:
            yield self._come
            self._come.clear()

    def rest(self) -> Iterator[Message]:
        """What nobody has accepted when it is closed."""
        yield from self._come
        while not self._messages.empty():
            yield self._messages.get()
