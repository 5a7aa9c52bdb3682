"""The body of a request: read within bounds, and parsed so that nobody else waits for it.

A prompt of a million token ids is seven megabytes of JSON. Whatever reads that in one call keeps the
interpreter to itself until it is done, in a thread too: the event loop with everybody's streams and
the engine stand still meanwhile. So lists of integers are lifted out first and read slice by slice, and
what is left beside them and beside texts must be small.

A key that stands twice in an object is refused, for parsers differ in which of the two counts. It shows
where there are more colons than keys.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import Request as HttpRequest
from pydantic_core import from_json

from ...errors import BadInput
from .problems import BODY, Problem

LEAST_BYTES_PER_S = 65536
"""A body that comes more slowly than this, after its first moments, is given up."""

MOST_BARE_BYTES = 2**18
"""JSON outside of texts and lists of integers: braces, commas, numbers. Real bodies have a few thousand."""

SLICE_BYTES = 2**14
SHORT_BYTES = 64
"""Lists up to here are not worth lifting."""

MOST_SHOWN = 64
"""Characters of a client's key in what it is told."""

_OPENING = re.compile(rb'["\[]')
_GONE = 499
_CLOSE = {"Connection": "close"}  # the rest of the body is not read


async def read(http: HttpRequest, most_bytes: int, patience_s: float) -> bytes:
    """The whole body. Raises Problem: too large (413), too slow (408), no JSON (400)."""
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(400, f"the body must be application/json (got {kind!r})")
    too_large = Problem(413, f"the body is larger than {most_bytes:,} bytes", headers=_CLOSE)
    announced = http.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most_bytes):
        raise too_large
    pieces, size, began_s = [], 0, time.monotonic()
    more = True
    while more:
        due_s = began_s + patience_s + size / LEAST_BYTES_PER_S
        try:
            message = await asyncio.wait_for(http.receive(), due_s - time.monotonic())
        except TimeoutError:
            text = f"the body did not come: {size:,} bytes in {time.monotonic() - began_s:.0f} s"
            raise Problem(408, text, headers=_CLOSE) from None
        if message["type"] == "http.disconnect":
            raise Problem(_GONE, "the client went away")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > most_bytes:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(pieces)


def parse(raw: bytes) -> Any:
    """The value that the JSON describes, with lists of integers as tuples where they are long.

    Raises BadInput: malformed, not UTF-8, NaN or Infinity, nested too deep, too much beside texts and ids;
    Problem: a key that stands twice.
    """
    bare, lists, num_colons = _lift(raw)
    try:
        value = from_json(bare, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        reason = str(error)
        if lists:
            reason = reason.partition(" at line")[0]  # its columns are those of what is left
        raise BadInput(f"malformed JSON: {reason}", where=BODY) from error
    if _num_keys(value) != num_colons:
        _refuse_twins(bare.decode())
    return _put_back(value, lists) if lists else value


def _lift(raw: bytes) -> tuple[bytes, Mapping[str, tuple[int, ...]], int]:
    """The JSON with a name in place of each list of integers, those by name, and the colons outside of texts.

    No client can guess the names, so none can be confused with a text of the body.
    """
    secret = secrets.token_hex(16)
    lists: dict[str, tuple[int, ...]] = {}
    kept: list[bytes] = []
    copied = at = num_bare = num_colons = 0
    end = -1
    while at < len(raw):
        opening = _OPENING.search(raw, at, at + MOST_BARE_BYTES)
        stop = opening.start() if opening else min(len(raw), at + MOST_BARE_BYTES)
        num_bare += stop - at + 1
        num_colons += raw.count(b":", at, stop)
        if num_bare > MOST_BARE_BYTES:
            raise BadInput(
                f"more than {MOST_BARE_BYTES:,} bytes of JSON beside texts and token ids",
                where=BODY,
                do="send fewer messages or prompts at once",
            )
        if opening is None:
            break
        if opening[0] == b'"':
            at = _after_text(raw, stop + 1)
            continue
        if end < stop:  # looked for once, however many lists are open
            found = raw.find(b"]", stop)
            end = found if found >= 0 else len(raw)
        long = end - stop > SHORT_BYTES and end < len(raw)
        ids = _integers(raw, stop + 1, end) if long else None
        at = stop + 1
        if ids is not None:
            name = f"{secret}{len(lists)}"
            lists[name] = ids
            kept += [raw[copied:stop], b'"', name.encode(), b'"']
            copied = at = end + 1
    return b"".join([*kept, raw[copied:]]) if lists else raw, lists, num_colons


def _after_text(raw: bytes, at: int) -> int:
    """Where a text ends that goes on at `at`: behind a quote with an even number of backslashes before it."""
    while (quote := raw.find(b'"', at)) >= 0:
        piece = raw[at:quote]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 0:
            return quote + 1
        at = quote + 1
    return len(raw)


def _integers(raw: bytes, start: int, end: int) -> tuple[int, ...] | None:
    """The integers between two brackets; None if there is anything else."""
    ids: list[int] = []
    while True:
        stop = end if end - start <= SLICE_BYTES else raw.rfind(b",", start, start + SLICE_BYTES)
        if stop < 0:
            return None
        try:
            part = from_json(b"[" + raw[start:stop] + b"]")
        except ValueError:
            return None
        if set(map(type, part)) != {int}:  # an empty slice too: a comma without a number
            return None
        ids += part
        if stop == end:
            return tuple(ids)
        start = stop + 1


def _put_back(value: Any, lists: Mapping[str, tuple[int, ...]]) -> Any:
    if isinstance(value, str):
        return lists.get(value, value)
    if isinstance(value, list):
        return [_put_back(item, lists) for item in value]
    if isinstance(value, dict):
        return {key: _put_back(item, lists) for key, item in value.items()}
    return value


def _num_keys(value: Any) -> int:
    """Of all objects in it."""
    if isinstance(value, dict):
        return len(value) + sum(map(_num_keys, value.values()))
    return sum(map(_num_keys, value)) if isinstance(value, list) else 0


def _refuse_twins(text: str) -> NoReturn:
    """Read once more, for the key's name."""

    def look(pairs: list[tuple[str, object]]) -> None:
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                shown = key if len(key) <= MOST_SHOWN else f"{key[:MOST_SHOWN]}…"
                raise Problem(
                    400, f"body: the key {shown!r} stands twice in an object; send it once", shown
                )
            seen.add(key)

    json.loads(text, object_pairs_hook=look, parse_int=str, parse_float=str)
    raise AssertionError("fewer keys than colons, and each key once")
