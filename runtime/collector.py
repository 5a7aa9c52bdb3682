"""Python's garbage collector, kept out of the engine's steps.

A step of a thousand decodes makes thousands of objects, nearly all of which are gone when it is settled: by
themselves, for there are no cycles among them. The collector counts them all the same, and looks through
everything that is alive every hundred steps or so. With a prompt of ten million tokens there, that is tens of
milliseconds each time.
"""

from __future__ import annotations

import gc

YOUNG = 10_000
"""Objects that came and stayed, before it looks at these alone: more than a thousand decodes' step has."""
OLDER = 3
"""How often it does before it looks at those that stayed longer; and how often that, before at all."""


def keep_out() -> None:
    """What is there by now is never looked at again, and what comes seldom. Of the whole process."""
    gc.collect()
    gc.freeze()
    gc.collect()  # it waits until a quarter as much came as stayed the last time: of what is frozen, much
    gc.set_threshold(YOUNG, OLDER, OLDER)
