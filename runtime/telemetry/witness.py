"""Who is told what happens to requests and workers, in the engine's thread, so quickly."""

from __future__ import annotations

from ...errors import MnemocError
from ..request import FinishReason, Handle
from ..scheduling.job import Job


class Witness:
    """Sees all of it and says nothing; those who log and trace override what they need."""

    def came(self, job: Job, handle: Handle) -> None:
        """The engine has the request; it waits for pages."""

    def admitted(self, job: Job, handle: Handle) -> None:
        """It has pages, for the first time or again after a preemption."""

    def first_token(self, job: Job, handle: Handle) -> None: ...

    def broken(self, job: Job, handle: Handle) -> None:
        """Its first token, or for the first time a later one, came after it was promised."""

    def ended(
        self, job: Job, handle: Handle, reason: FinishReason | None, error: MnemocError | None
    ) -> None:
        """reason: None if it failed"""

    def lost(self, error: MnemocError) -> None:
        """The workers are gone."""

    def back(self) -> None:
        """Workers are up again."""
