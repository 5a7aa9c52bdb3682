"""Who else was at work on this machine: what disturbs a measurement."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class Watch:
    """Counts processor time from now on."""

    def __init__(self) -> None:
        self.started, self.busy_s, self.own_s = time.monotonic(), _busy_s(), _own_s()

    def others(self) -> float:
        """Cores that others kept busy since then, hypervisor and kernel included; 0 where nobody counts.

        Of children only those count as our own that have ended and been waited for.
        """
        theirs_s = (_busy_s() - self.busy_s) - (_own_s() - self.own_s)
        return max(0.0, theirs_s / (time.monotonic() - self.started))


def _busy_s() -> float:
    """Seconds that all cores of the machine have been busy."""
    try:
        name, *ticks = _STAT.read_text().partition("\n")[0].split()
    except OSError:
        return 0.0
    assert name == "cpu"
    user, nice, system, _idle, _iowait, *interrupts_and_stolen = map(int, ticks[:8])
    busy = user + nice + system + sum(interrupts_and_stolen)
    return busy / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)
