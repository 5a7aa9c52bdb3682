"""What an operator may choose about a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..policies import DEFAULT


@dataclass(frozen=True)
class Options:
    """policy, prefix_caching, trace_out: as for `Engine.start`

    strict_slo: refuse requests whose first token is predicted to come later than promised
    news_every_s: between two comments in a stream while its prompt waits or prefills
    """

    policy: str = DEFAULT.name
    prefix_caching: bool = True
    trace_out: Path | None = None
    strict_slo: bool = False
    news_every_s: float = 1.0
