"""Text ⇄ token ids, through the model's own tokenizer.json, and text as it grows token by token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from ..errors import BadInput

FILE = "tokenizer.json"
LONG = 1024
"""Tokens from which on it is worth to let other threads run while they are decoded."""

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are not yet a whole character
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte in vocabularies of characters


def _byte_names() -> Iterator[tuple[str, int]]:
    """How vocabularies of bytes write each: as itself where it is visible, else as a letter from 256 on."""
    others = itertools.count(256)
    for byte in range(256):
        visible = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        yield chr(byte if visible else next(others)), byte


_BYTE_OF: Mapping[str, int] = dict(_byte_names())


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
        """Token ids of a text. special: add what the model wants around a text (a leading BOS).

        Other threads run meanwhile: a batch is encoded without the interpreter, a single text is not.
        BadInput for half of a surrogate pair, which is no text.
        """
        try:
            (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
        except UnicodeEncodeError as error:
            raise BadInput(
                "not a text: half of a surrogate pair", got=error.object[error.start]
            ) from error
        return tuple(encoded.ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids. special: special tokens too."""
        if len(ids) < LONG:
            return str(self._backend.decode(list(ids), skip_special_tokens=not special))
        (text,) = self._backend.decode_batch([ids], skip_special_tokens=not special)
        return str(text)

    def name(self, id: int) -> str:
        """A token as the vocabulary writes it."""
        return str(self._backend.id_to_token(id))

    def token(self, id: int) -> str:
        """A token's own text, with the space before it, also if it is a special one."""
        alone, twice = (
            self._backend.decode(ids, skip_special_tokens=False) for ids in ([id], [id, id])
        )
        return str(twice[len(alone) :])

    def token_bytes(self, id: int) -> bytes:
        """A token's bytes: also of one that is only part of a character."""
        text = self.token(id)
        if _UNFINISHED not in text:
            return text.encode()
        name = str(self._backend.id_to_token(id))
        if _BYTE.fullmatch(name):
            return bytes.fromhex(name[3:5])
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return text.encode()


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
