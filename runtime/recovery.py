"""What the engine does when workers die or hang: fresh ones, and whoever ran goes on where it stopped."""

from __future__ import annotations

from ..artifact import Manifest
from ..errors import MnemocError, RuntimeFault
from ..units import format_duration
from .executor.vigil import LOOK_S
from .executor.workers import Workers
from .flights import Flights
from .request import now_s

MAX_RESTARTS = 3
"""Restarts in a row, without a step in between, after which the engine gives up."""
STEADY_S = 60.0
"""Workers that were up for so long were well, also if nobody had work for them."""
MAX_GUILTY = 3
"""Requests in a row, without a step in between, that are found to kill the workers: then it is not them."""
STEP_TIMEOUT_S = 20.0
"""A step that hangs is known after this time, unless it was predicted to take long."""
PATIENCE = 10
"""A step may take this many times what is predicted for it and for all others on their way."""
FIRST_STEPS = 6
"""On a GPU the first step may take this many times as long: kernels are compiled, libraries loaded."""


class Recovery:
    """Watches over the steps of workers that seem alive, and starts fresh ones.

    step_timeout_s: as `STEP_TIMEOUT_S`
    """

    def __init__(
        self, manifest: Manifest, flights: Flights, workers: Workers, step_timeout_s: float
    ) -> None:
        self._flights = flights
        self._workers = workers
        self._step_timeout_s = step_timeout_s
        self._first_factor = 1 if manifest.plan.target == "cpu" else FIRST_STEPS
        self._restarts = self._guilty = 0
        self._up_s: float | None = None
        self._waited_s, self._looked_s = 0.0, now_s()
        self._factor = self._first_factor

    def ready(self) -> None:
        """The workers are up."""
        self._up_s = now_s()

    def stepped(self) -> None:
        """A step came back."""
        self._restarts = self._guilty = 0
        self._waited_s = 0.0
        self._factor = 1

    def look(self) -> None:
        """Condemn workers that are at a step for absurdly long: in a deadlock, they still look alive.

        Only time in which the engine listens counts, as in `vigil`.
        """
        looked_s, self._looked_s = self._looked_s, now_s()
        if not self._workers.up or not self._flights.in_the_air:
            self._waited_s = 0.0
            return
        self._waited_s += min(self._looked_s - looked_s, 2 * LOOK_S)
        if self._waited_s < self._factor * self._step_timeout_s:
            return
        predicted_s = self._flights.predicted_s
        if self._waited_s > PATIENCE * predicted_s:
            story = (
                f"no step has ended for {format_duration(self._waited_s)}, where "
                f"{format_duration(predicted_s)} was predicted"
            )
            self._workers.condemn(
                RuntimeFault(story, do="for slower machines raise --step-timeout")
            )

    def restart(self, error: MnemocError) -> None:
        """The workers are gone. Raises RuntimeFault where fresh ones would be of no use."""
        if self._up_s is not None and now_s() - self._up_s > STEADY_S:
            self._restarts = self._guilty = 0
        self._up_s = None
        if self._flights.replay(error):
            self._restarts = 0
            self._guilty += 1
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise RuntimeFault(f"gave up after {MAX_RESTARTS} restarts: {error}") from error
        if self._guilty == MAX_GUILTY:
            story = (
                f"gave up: {MAX_GUILTY} requests in a row, and the workers died over each: {error}"
            )
            raise RuntimeFault(story) from error
        self._factor = self._first_factor
        self._workers.spawn()
