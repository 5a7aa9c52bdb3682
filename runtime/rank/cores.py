"""Which cores of this machine a worker runs on, and who of its threads goes first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def giving_way() -> Iterator[None]:
    """Threads that are started within do not interrupt the one that starts them.

    gloo's threads wake for each message. One that interrupts the thread that computes, in a call that holds
    the connection's lock, tries that lock again and again until its time slice ends, and a message of
    0.1 ms takes milliseconds. As a batch task it waits until the other blocks, and still gets its share.
    """
    if not hasattr(os, "SCHED_BATCH"):
        yield
        return
    before, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, parameters)
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, parameters)
