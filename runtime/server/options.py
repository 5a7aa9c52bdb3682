"""What an operator may choose about a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..policies import DEFAULT


@dataclass(frozen=True)
class Options:
    """policy, prefix_caching, trace_out: as for `Engine.start`

    control: tcp://HOST:PORT on which to wait for workers from outside, instead of forking them
    """

    policy: str = DEFAULT.name
    prefix_caching: bool = True
    trace_out: Path | None = None
    control: str | None = None
