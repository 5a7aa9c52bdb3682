"""Whose fault it may be that workers die: a request that kills them must not do so for ever.

Suspect is whoever was in a micro-batch on its way when they died: if it is to blame, the token that kills
lies behind those that were through and among those on their way. Where the next death leaves no such token,
because the request was elsewhere, the suspicion begins anew; once it has come past all of them, it is
innocent. Those that could be to blame for `DEATHS` − 1 deaths in a row are tried: half of them go on, the
others are held back, until those on trial are innocent or the workers have died once more. So each death
halves them, and one that is on trial alone when they die is guilty. Workers that die for other reasons cost
nobody more than a moment; and where somebody ended them (`Violence`), nobody is suspected at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import RuntimeFault

DEATHS = 3
"""So often at least workers die with a request before it is given up."""


class Violence(RuntimeFault):
    """Workers were ended or stopped by somebody outside: no request is to blame."""


class Deadly(RuntimeFault):
    """Workers die over this request: it is not to be sent again."""


@dataclass(eq=False, slots=True)
class _Suspect:
    """deaths: in a row, that a token behind the first `through`, up to `reached`, may be to blame for."""

    through: int
    reached: int
    deaths: int = 1


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

    def died(self, present: Mapping[int, tuple[int, int]]) -> int | None:
        """The workers died. present: who was before them, with tokens that were through, and with those on
        their way.

        Returns the request whose fault it is, if that is plain by now.
        """
        tried = self._on_trial if len(self._on_trial) == 1 else set[int]()
        for id, (through, reached) in present.items():
            now = _Suspect(through, reached)
            before = self._all.get(id, now)
            both = max(through, before.through), min(reached, before.reached)
            if before is not now and both[0] < both[1]:
                now = _Suspect(*both, before.deaths + 1)
            self._all[id] = now
        self._choose()
        alone = tried & present.keys()
        return next((id for id in alone if self._all[id].deaths >= DEATHS), None)

    def computed(self, id: int, tokens: int) -> bool:
        """So many of a request's tokens are through; what `forget` says if that makes it innocent."""
        suspect = self._all.get(id)
        if suspect is None:
            return False
        suspect.through = max(suspect.through, tokens)
        return suspect.through >= suspect.reached and self.forget(id)

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
