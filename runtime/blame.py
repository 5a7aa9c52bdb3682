"""Which request may be to blame that workers died (`suspects`): the engine's side of it.

Those that must wait until others have been tried are kept out of admission.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import MnemocError
from .executor.suspects import Deadly, Suspects, Violence
from .scheduling.job import Job, MicroBatch
from .scheduling.scheduler import Scheduler


class Blame:
    """Of one scheduler's requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._suspects = Suspects()

    def died(
        self, on_their_way: Iterable[MicroBatch], error: MnemocError
    ) -> tuple[int, Deadly] | None:
        """The workers died over these micro-batches, and nobody has been sent back to wait yet.

        Returns the request whose fault it must be, if that is plain by now, and how it fails.
        """
        if isinstance(error, Violence):
            return None
        jobs = (job for micro_batch in on_their_way for job in self._jobs(micro_batch))
        guilty = self._suspects.died({job.id: (job.computed, job.cached) for job in jobs})
        self._hold()
        if guilty is None:
            return None
        deaths = self._suspects.deaths(guilty)
        fault = Deadly(f"the workers died {deaths} times in a row over this request: {error}")
        for note in getattr(error, "__notes__", ()):
            fault.add_note(note)
        return guilty, fault

    def landed(self, micro_batch: MicroBatch) -> None:
        """Whoever has come past where the workers died is not to blame for it."""
        if self._suspects:
            for job in self._jobs(micro_batch):
                if self._suspects.computed(job.id, job.computed):
                    self._hold()

    def over(self, id: int) -> None:
        """The request is."""
        if self._suspects.forget(id):
            self._hold()

    def _hold(self) -> None:
        self._scheduler.admission.hold(self._suspects.held)

    def _jobs(self, micro_batch: MicroBatch) -> Iterator[Job]:
        """Those in it that still run."""
        for sid in (*micro_batch.decodes, *(chunk.sid for chunk in micro_batch.chunks)):
            if (job := self._scheduler.running.get(sid)) is not None:
                yield job
