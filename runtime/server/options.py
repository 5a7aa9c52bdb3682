"""What an operator may choose about a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..policies import DEFAULT
from ..recovery import STEP_TIMEOUT_S


@dataclass(frozen=True)
class Options:
    """policy, prefix_caching, trace_out, step_timeout_s: as for `Engine.start`

    control: tcp://HOST:PORT on which to wait for workers from outside, instead of forking them
    drain_s: how long requests may still take once the server is told to stop
    strict_slo: refuse requests whose first token is predicted to come later than promised
    news_every_s: between two comments in a stream while its prompt waits or prefills
    """

    policy: str = DEFAULT.name
    prefix_caching: bool = True
    trace_out: Path | None = None
    step_timeout_s: float = STEP_TIMEOUT_S
    control: str | None = None
    drain_s: float = 30.0
    strict_slo: bool = False
    news_every_s: float = 1.0
