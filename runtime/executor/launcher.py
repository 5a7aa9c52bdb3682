"""Where a plan's workers come from, as far as `workers.Workers` needs to know. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import zmq

from ...errors import MnemocError


@dataclass(frozen=True)
class Complete:
    """A worker of every rank is there. token: what the set is called, and its workers by it"""

    token: str


@dataclass(frozen=True)
class Lost:
    """A worker of the set is gone, or can never belong to it.

    certain: no other sign will tell the cause better
    """

    error: MnemocError
    certain: bool


class Launcher(Protocol):
    """Workers of this machine (`workers.NurseryProcess`) or from outside (`outside.Outside`).

    taken: by the engine whose workers it starts; another must not tell it anything meanwhile
    """

    taken: bool

    @property
    def tended(self) -> bool:
        """Whether workers that end are started again by somebody else, ready or not."""

    def listen(self, socket: zmq.Socket[bytes]) -> None:
        """Bind the engine's socket to where the workers look for it."""

    def spawn(self, environment: Mapping[str, str], world: int) -> str | None:
        """Begin a fresh set. Its token, or None where `Complete` is to tell it."""

    def introduced(self, sender: zmq.Frame, frames: list[bytes]) -> list[Complete | Lost]:
        """What a message means that comes under a name that is not of the set."""

    def kill(self) -> None:
        """End the set."""

    @property
    def waitable(self) -> int | zmq.Socket[bytes]:
        """Readable when `hear` has something to say; another one after `spawn`."""

    def hear(self) -> list[Complete | Lost]:
        """What became of workers; call it when `waitable` is readable."""

    def close(self) -> None:
        """The launcher's end, and that of all its workers."""
