"""Text ⇄ token ids, through the model's own tokenizer.json, and text as it grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from ..errors import BadInput

FILE = "tokenizer.json"
_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are not yet a whole character


class Tokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, directory: Path) -> None:
        """Raises BadInput if there is no tokenizer.json, or it cannot be read."""
        if not directory.is_dir():
            raise BadInput(
                "no such directory of weights", where=directory, do="give a Hugging Face directory"
            )
        path = directory / FILE
        if not path.is_file():
            raise BadInput(
                f"no {FILE}", where=directory, do="give token ids, or a directory with a tokenizer"
            )
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise BadInput(f"not a tokenizer: {error}", where=path) from error

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of a text. special: add what the model wants around a text (a leading BOS)."""
        return tuple(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


class Detokenizer:
    """Text of a growing answer: `push` returns what has become certain, `rest` what is left.

    A character may take several tokens: its bytes are held back until they are whole. Only the last
    few tokens are decoded again, so that a long answer costs no more per token than a short one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # tokens from here on are decoded again: what precedes may shape spaces
        self._given = 0  # tokens before this one have been turned into text

    def push(self, id: int) -> str:
        """Take a token; the text that it completes, often its own, sometimes none."""
        self._ids.append(id)
        return self._new_text(final=False)

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        now = self._tokenizer.decode(self._ids[self._context :])
        if now.endswith(_UNFINISHED) and not final:
            return ""
        self._context, self._given = self._given, len(self._ids)
        return now[len(before) :]
