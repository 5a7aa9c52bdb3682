"""The log: a line for each event, as JSON or for people, on stderr or in a file.

A disk that is full ends nothing: what cannot be written is counted, and the log says so when it goes on. A
file that was moved away (logrotate) is opened anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ...errors import BadInput
from .chronicle import Entry, Field

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")
STDERR = 2


class Journal:
    """Writes entries. lost: lines that could not be written"""

    def __init__(self, format: Format, path: Path | None = None) -> None:
        """path: None is stderr. BadInput for a file that cannot be opened."""
        self.lost = 0
        self._unsaid = 0
        self._torn = False
        self._line: Callable[[Entry], str] = as_json if format == "json" else as_text
        self._path = path
        self._file = STDERR if path is None else _open(path)

    def write(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        self._follow()
        lines = [self._line(entry) for entry in entries]
        if self._unsaid:
            missing = Entry(entries[0].time_s, "warning", "log_lines_lost", {"lines": self._unsaid})
            lines.insert(0, self._line(missing))
        if self._torn:
            lines.insert(0, "")
        data = "\n".join([*lines, ""]).encode()
        try:
            while data:
                written = os.write(self._file, data)
                self._torn = data[written - 1 : written] != b"\n"
                data = data[written:]
            self._unsaid = 0
        except OSError:
            missing_lines = min(len(entries), data.count(b"\n"))
            self.lost += missing_lines
            self._unsaid += missing_lines

    def close(self) -> None:
        if self._path is not None:
            os.close(self._file)

    def _follow(self) -> None:
        """Open the file anew if another, or none, is where it was."""
        if self._path is None:
            return
        try:
            there, here = os.stat(self._path), os.fstat(self._file)
            if (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev):
                return
        except FileNotFoundError:
            pass
        except OSError:
            return
        with contextlib.suppress(BadInput):  # then what there is goes on into the old one
            opened = _open(self._path)
            os.close(self._file)
            self._file = opened


def as_json(entry: Entry) -> str:
    """One object: time, level, event; of a request its id; then what the event is about."""
    head = {"time": _time(entry), "level": entry.level, "event": entry.event}
    return json.dumps({**head, **_fields(entry)}, ensure_ascii=False)


def as_text(entry: Entry) -> str:
    """time level event key=value …"""
    words = [_time(entry), f"{entry.level:7}", entry.event]
    words += [f"{name}={_word(value)}" for name, value in _fields(entry).items()]
    return " ".join(words)


def _fields(entry: Entry) -> Mapping[str, Field]:
    account = entry.account
    about: dict[str, Field] = {}
    if account is not None:
        about = {"request_id": account.origin.id, "prompt_tokens": account.prompt_tokens}
        if account.origin.index:
            about["answer"] = account.origin.index
    fields = {name: value for name, value in entry.fields.items() if value is not None}
    return {**about, **{name: _rounded(value) for name, value in fields.items()}}


def _rounded(value: Field) -> Field:
    return round(value, 6) if isinstance(value, float) else value


def _word(value: Field) -> str:
    text = json.dumps(value, ensure_ascii=False)
    plain = isinstance(value, str) and value and not set(value) & set(' "=\\\n\t\r')
    return str(value) if plain and text[1:-1] == value else text


def _time(entry: Entry) -> str:
    moment = datetime.fromtimestamp(entry.time_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise BadInput(f"cannot write: {error.strerror}", where=path) from error
