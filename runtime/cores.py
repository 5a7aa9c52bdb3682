"""Which cores of this machine a worker runs on."""

from __future__ import annotations

import os


def settle(number: int, world: int, threads: int) -> None:
    """Where `world` workers fill this machine, this one, by its number, keeps to cores of its own.

    Linux draws two processes that talk over loopback to one core, where they take turns instead of
    working side by side; a message then waits for a time slice, milliseconds instead of a tenth.
    """
    if world == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if world * threads >= len(cores):
        first = number * threads
        os.sched_setaffinity(0, {cores[i % len(cores)] for i in range(first, first + threads)})
