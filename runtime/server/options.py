"""What an operator may choose about a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..policies import DEFAULT


@dataclass(frozen=True)
class Options:
    """policy, prefix_caching, trace_out: as for `Engine.start`"""

    policy: str = DEFAULT.name
    prefix_caching: bool = True
    trace_out: Path | None = None
