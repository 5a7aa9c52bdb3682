"""The small family of errors that users see: each says what, where, got what, do what.

The command line prints the sentence and leaves with the class's exit code; anything else that
escapes is our fault (exit code 1). Asserts inside the code are for us, never for users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .alternatives import Frontier, Relaxation


class MnemocError(Exception):
    """An error that is reported as one sentence, without a traceback.

    what:  what is wrong ("unknown key 'peak_flop'")
    where: file, key or option it was found in
    got:   the offending value, if the sentence does not hold it already
    do:    what the user can do about it
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: object = None, got: object = None, do: str | None = None
    ) -> None:
        self.what, self.where, self.got, self.do = what, where, got, do
        sentence = f"{where}: {what}" if where is not None else what
        if got is not None:
            sentence += f" (got {got!r})"
        if do is not None:
            sentence += f"; {do}"
        super().__init__(sentence)


class UsageError(MnemocError):
    """The command line asks for something that makes no sense."""

    exit_code = 2


class Infeasible(MnemocError):
    """No plan keeps the promise.

    binding: the constraint that says so; nearest: promises and clusters near by that can be kept;
    frontier: what the devices can do instead, where it was asked for
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        binding: str,
        do: str | None = None,
        nearest: tuple[Relaxation, ...] = (),
        frontier: Frontier | None = None,
    ) -> None:
        self.binding, self.nearest, self.frontier = binding, nearest, frontier
        super().__init__(what, do=do)


class BadInput(MnemocError):
    """A file or value from outside is missing, malformed or does not fit."""

    exit_code = 4


class RuntimeFault(MnemocError):
    """Something of ours failed while running: a worker died, a port is taken away."""

    exit_code = 1
