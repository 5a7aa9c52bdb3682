"""From the engine's thread into the event loop: all events of a step at once, not one by one.

Waking the loop costs a system call and the change of a thread; a step may have hundreds of tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from ..request import Event

Take = Callable[[Event], None]


class Mailbox:
    """One for an application. What is in it is taken out in the event loop."""

    def __init__(self) -> None:
        self._events: deque[tuple[Take, Event]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._called = False

    def sink(self, take: Take) -> Take:
        """For `Engine.submit`: `take` hears in the running event loop of what the sink is called with."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._called = loop, False

        def put(event: Event) -> None:
            self._events.append((take, event))
            if not self._called:
                self._called = True
                with contextlib.suppress(RuntimeError):  # the server is gone: nobody reads it
                    loop.call_soon_threadsafe(self._deliver)

        return put

    def _deliver(self) -> None:
        self._called = False  # first: what comes from now on calls again
        for _ in range(len(self._events)):
            take, event = self._events.popleft()
            take(event)
