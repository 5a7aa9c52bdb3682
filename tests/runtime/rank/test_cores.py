"""What the threads of a worker give way to."""

import os
import threading

from mnemoc.runtime.rank import cores


def policy_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join()
    return found[0]


def test_threads_that_are_started_within_do_not_interrupt_and_later_ones_may() -> None:
    before = os.sched_getscheduler(0)
    with cores.giving_way():
        assert policy_of_a_new_thread() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == policy_of_a_new_thread() == before
