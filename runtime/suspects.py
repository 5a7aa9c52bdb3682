"""Whose fault it may be that workers die: a request that kills them must not do so for ever.

Suspect is whoever was in a micro-batch on its way when they died, until it has come past where it stood
then. Those that were there `DEATHS` − 1 times in a row are tried: half of them go on, the others are held
back, until those on trial have come past it or the workers have died once more. So each death halves them,
and one that is on trial alone when they die is guilty. Workers that die for other reasons cost nobody more
than a moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEATHS = 3
"""So often at least workers die with a request before it is given up."""


@dataclass(eq=False, slots=True)
class _Suspect:
    """deaths: in a row; reached: its tokens that were computed then, or on their way."""

    deaths: int = 0
    reached: int = 0


@dataclass(eq=False)
class Suspects:
    """By the ids of requests. held: those that must wait until others have been tried."""

    held: frozenset[int] = frozenset()
    _all: dict[int, _Suspect] = field(default_factory=dict)
    _on_trial: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self._all)

    def deaths(self, id: int) -> int:
        """In a row, with this request before them."""
        return self._all[id].deaths

    def died(self, present: Mapping[int, int]) -> int | None:
        """The workers died. present: who was before them, and how many tokens they had reached.

        Returns the request whose fault it is, if that is plain by now.
        """
        for id, reached in present.items():
            suspect = self._all.setdefault(id, _Suspect())
            suspect.deaths += 1
            suspect.reached = max(suspect.reached, reached)
        alone = next(iter(self._on_trial)) if len(self._on_trial) == 1 else None
        self._choose()
        return alone if alone in present else None

    def computed(self, id: int, tokens: int) -> bool:
        """So many of a request's tokens are through; what `forget` says if that makes it innocent."""
        suspect = self._all.get(id)
        return suspect is not None and tokens >= suspect.reached and self.forget(id)

    def forget(self, id: int) -> bool:
        """The request is innocent, or over; whether that ends the trial, and others are held back now."""
        tried = self._on_trial == {id}
        self._on_trial.discard(id)
        self._all.pop(id, None)
        if tried:
            self._choose()
        return tried

    def _choose(self) -> None:
        """Half of those that were there most often are tried next."""
        line_up = [id for id, one in self._all.items() if one.deaths >= DEATHS - 1]
        most = max((self._all[id].deaths for id in line_up), default=0)
        likeliest = [id for id in line_up if self._all[id].deaths == most]
        self._on_trial = set(likeliest[: -(-len(likeliest) // 2)])
        self.held = frozenset(line_up) - self._on_trial
