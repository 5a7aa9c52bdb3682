"""What an operator may choose about a server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadInput
from ..recovery import STEP_TIMEOUT_S
from ..scheduling.policies import DEFAULT
from .journal import Format

BODY_BYTES_PER_TOKEN = 16
LEAST_BODY_BYTES = 2**22

_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Limits:
    """What a client may take. None: no limit, or for the body what follows from the plan.

    api_keys: one of them must come with each request; none: anybody may ask
    body_bytes: of one request; None: 16 for each token of the plan's context, and at least 4 MiB
    body_s: for a body to come, beside what its size takes at 64 KiB/s
    concurrency: completions at work at once, streams among them; queue: answers that wait for the engine
    send_s: for a client to take what is sent to it; then its connection ends, and with it its request. The
        kernel watches, where it can (Linux's TCP_USER_TIMEOUT)
    """

    api_keys: tuple[str, ...] = ()
    body_bytes: int | None = None
    body_s: float = 10.0
    concurrency: int | None = 4096
    queue: int | None = 4096
    send_s: float = 300.0

    def __post_init__(self) -> None:
        if not all(_KEY.fullmatch(key) for key in self.api_keys):
            raise BadInput(
                "an API key must be printable ASCII without spaces, and not empty",
                where="api_keys",
                do="look whether a variable is unset where it is given",
            )

    def most_body_bytes(self, context: int) -> int:
        """For a plan whose context has so many tokens."""
        return self.body_bytes or max(LEAST_BODY_BYTES, BODY_BYTES_PER_TOKEN * context)


@dataclass(frozen=True)
class Options:
    """policy, prefix_caching, trace_out, step_timeout_s: as for `Engine.start`

    control: tcp://HOST:PORT on which to wait for workers from outside, instead of forking them
    drain_s: how long requests may still take once the server is told to stop
    strict_slo: refuse requests whose first token is predicted to come later than promised
    news_every_s: between two comments in a stream while its prompt waits or prefills
    log_format, log_file: how the log is written, and where; None: none, and on stderr
    otlp_endpoint: where traces go, by OTLP over HTTP; None: where OpenTelemetry's environment says
    """

    policy: str = DEFAULT.name
    prefix_caching: bool = True
    trace_out: Path | None = None
    step_timeout_s: float = STEP_TIMEOUT_S
    control: str | None = None
    drain_s: float = 30.0
    strict_slo: bool = False
    news_every_s: float = 1.0
    limits: Limits = Limits()
    log_format: Format | None = None
    log_file: Path | None = None
    otlp_endpoint: str | None = None
