"""What an operator may choose about a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..policies import DEFAULT
from .journal import Format


@dataclass(frozen=True)
class Options:
    """policy, prefix_caching, trace_out: as for `Engine.start`

    log_format, log_file: how the log is written, and where; None: none, and on stderr
    otlp_endpoint: where traces go, by OTLP over HTTP; None: where OpenTelemetry's environment says
    """

    policy: str = DEFAULT.name
    prefix_caching: bool = True
    trace_out: Path | None = None
    log_format: Format | None = None
    log_file: Path | None = None
    otlp_endpoint: str | None = None
