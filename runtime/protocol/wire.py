"""Messages of `protocol` as frames: a JSON header, and behind it in binary whatever may be long. No torch.

Step    header · decodes, (id, token) as int64 · tokens, runs of pages and copies, as int32
Done    header · tokens, (id, token) as int64 · float32 logits, a frame for each request
Hello, Welcome, Refused, Ready, Failed    header
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
from array import array
from collections.abc import Sequence
from typing import Any

from ..request import Sampling
from .messages import (
    Admission,
    Change,
    Copies,
    Done,
    Failed,
    Hello,
    MorePages,
    Ready,
    Refused,
    Reply,
    Step,
    Welcome,
)

Frames = list[bytes]
Pairs = Sequence[tuple[int, int]]


def encode_step(step: Step) -> Frames:
    body: list[bytes | array[int]] = []
    changes = [_encoded(change, body) for change in step.changes]
    header = json.dumps([step.number, changes, step.chunks])
    return [header.encode(), _packed("q", step.decodes), b"".join(body)]


def decode_step(frames: Frames) -> Step:
    number, changes, chunks = json.loads(frames[0])
    body = _Body(frames[2])
    return Step(
        number,
        [change if isinstance(change, int) else _change(body, *change) for change in changes],
        _pairs("q", frames[1]),
        [(id, rows) for id, rows in chunks],
    )


def encode_hello(hello: Hello) -> Frames:
    return [json.dumps(["hello", *dataclasses.astuple(hello)]).encode()]


def decode_hello(frames: Frames) -> Hello | None:
    """None for any other message."""
    kind, *fields = json.loads(frames[0])
    return Hello(*fields) if kind == "hello" else None


def encode_answer(answer: Welcome | Refused) -> Frames:
    if isinstance(answer, Welcome):
        return [json.dumps(["welcome", answer.token]).encode()]
    return [json.dumps(["refused", answer.sentence]).encode()]


def decode_answer(frames: Frames) -> Welcome | Refused:
    kind, text = json.loads(frames[0])
    return Welcome(text) if kind == "welcome" else Refused(text)


def encode_reply(reply: Reply) -> Frames:
    if isinstance(reply, Ready):
        return [json.dumps(["ready", reply.rank]).encode()]
    if isinstance(reply, Failed):
        fields = [reply.rank, reply.sentence, reply.exit_code, reply.trace]
        return [json.dumps(["failed", *fields]).encode()]
    whose = [(id, position) for id, position, _ in reply.logits]
    header = json.dumps(["done", reply.number, reply.group, whose, reply.busy_s, reply.logprobs])
    return [header.encode(), _packed("q", reply.tokens), *(rows for *_, rows in reply.logits)]


def decode_reply(frames: Frames) -> Reply:
    kind, *fields = json.loads(frames[0])
    if kind == "ready":
        return Ready(*fields)
    if kind == "failed":
        return Failed(*fields)
    number, group, whose, busy_s, raw = fields
    logits = [(*at, rows) for at, rows in zip(whose, frames[2:], strict=True)]
    logprobs = [(id, logprob, tuple((id, p) for id, p in top)) for id, logprob, top in raw]
    return Done(number, group, _pairs("q", frames[1]), logits, busy_s, logprobs)


def _encoded(change: Change, body: list[bytes | array[int]]) -> Any:
    """What the header says of a change; the rest goes behind the body."""
    if isinstance(change, int):
        return change
    if isinstance(change, MorePages):
        body.append(_packed("i", change.pages))
        return ["more", change.id, change.group, len(change.pages)]
    if isinstance(change, Copies):
        body.append(_packed("i", change.pairs))
        return ["copies", change.group, change.out, len(change.pairs)]
    body.append(array("i", change.tokens))
    body += (_packed("i", runs) for runs in change.pages)
    sampling = dataclasses.asdict(change.sampling)
    sampling["stop_ids"] = sorted(change.sampling.stop_ids)
    numbers = [change.id, change.home, change.kv_tokens, change.generated, change.cached]
    counts = [len(change.tokens), *map(len, change.pages)]
    return ["admission", numbers, sampling, change.logits, counts]


def _change(body: _Body, kind: str, *fields: Any) -> Change:
    if kind == "more":
        id, group, count = fields
        return MorePages(id, group, tuple(body.pairs(count)))
    if kind == "copies":
        group, out, count = fields
        return Copies(group, out, body.pairs(count))
    (id, home, kv_tokens, generated, cached), sampling, logits, (length, *counts) = fields
    tokens = array("i", body.take(length))
    pages = tuple(tuple(body.pairs(count)) for count in counts)
    sampling["stop_ids"] = frozenset(sampling["stop_ids"])
    sampling["logit_bias"] = tuple((id, bias) for id, bias in sampling["logit_bias"])
    logits = tuple(logits) if isinstance(logits, list) else logits
    chosen = Sampling(**sampling)
    return Admission(id, home, kv_tokens, chosen, logits, tokens, generated, cached, pages)


class _Body:
    """int32 numbers, read from the front."""

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    def take(self, count: int) -> bytes:
        taken, self._left = self._left[: 4 * count], self._left[4 * count :]
        return bytes(taken)

    def pairs(self, count: int) -> list[tuple[int, int]]:
        return _pairs("i", self.take(2 * count))


def _packed(kind: str, pairs: Pairs) -> bytes:
    """Twice as quick as an array of them."""
    return struct.pack(f"={2 * len(pairs)}{kind}", *itertools.chain.from_iterable(pairs))


def _pairs(kind: str, data: bytes) -> list[tuple[int, int]]:
    numbers = array(kind, data)
    return list(zip(numbers[::2], numbers[1::2], strict=True))
