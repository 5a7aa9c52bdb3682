"""Many requests at once, of all kinds, and what each of them got: for a test and a benchmark of the engine.

Lengths are mixed, half of the prompts begin with one of a few prefixes, one in six clients loses interest
(before, within or after the prefill), and tokens are chosen in several ways, each of which has to give the
same tokens in any company.
"""

from __future__ import annotations

import dataclasses
import queue
import random
from collections.abc import Sequence
from dataclasses import dataclass

from mnemoc.runtime import Engine, Handle, Request, Sampling

NEVER = 1 << 30


@dataclass(frozen=True)
class Asked:
    """A request, and after how many events (progress or tokens) its client cancels it."""

    request: Request
    patience: int = NEVER


def make_crowd(count: int, seed: int = 0) -> list[Asked]:
    """Prompts of 4 to 560 tokens and outputs of 2 to 80 tokens; the same ones for the same seed."""
    choose = random.Random(seed)
    prefixes = [_bytes(choose, length) for length in (40, 75, 130, 210)]
    crowd = []
    for i in range(count):
        length = choose.choice((choose.randrange(4, 60),) * 5 + (choose.randrange(60, 350),) * 2)
        prefix = choose.choice(prefixes) if choose.random() < 0.5 else ()
        sampling = Sampling(ignore_eos=True)
        if i % 2:
            sampling = dataclasses.replace(sampling, temperature=0.9, top_p=0.9, seed=seed + i)
        if i % 4 == 3:
            sampling = dataclasses.replace(
                sampling, top_k=40, repetition_penalty=1.2, frequency_penalty=0.3
            )
        output = choose.choice((choose.randrange(2, 24),) * 3 + (choose.randrange(40, 80),))
        request = Request((*prefix, *_bytes(choose, length)), output, sampling)
        crowd.append(Asked(request, choose.randrange(8) if choose.random() < 1 / 6 else NEVER))
    return crowd


def serve(engine: Engine, crowd: Sequence[Asked]) -> list[Handle]:
    """All requests at once; their handles when the last one is over."""
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    heard = [0] * len(crowd)
    handles = [
        engine.submit(asked.request, lambda _, i=i: events.put(i)) for i, asked in enumerate(crowd)
    ]
    going = set(range(len(crowd)))
    for i in going:
        if not crowd[i].patience:
            handles[i].cancel()
    while going:
        i = events.get()
        heard[i] += 1
        if heard[i] == crowd[i].patience:
            handles[i].cancel()
        if handles[i].finish_reason is not None:
            going.discard(i)
    return handles


def alone(engine: Engine, crowd: Sequence[Asked]) -> list[list[int]]:
    """The tokens of each request while nobody else is there."""
    return [engine.submit(asked.request).result().tokens for asked in crowd]


def wrong(handles: Sequence[Handle], expected: Sequence[Sequence[int]]) -> list[str]:
    """Requests with other tokens than alone, as far as they got, in words."""
    found = []
    for handle, tokens in zip(handles, expected, strict=True):
        got = handle.tokens
        if got != tokens[: len(got)] or (handle.finish_reason == "length") != (got == tokens):
            same = next(
                (i for i, (a, b) in enumerate(zip(got, tokens, strict=False)) if a != b), len(got)
            )
            found.append(
                f"request {handle.id}, {len(handle.request.prompt_ids)} prompt tokens, "
                f"{handle.request.sampling}: token {same} of {len(tokens)} differs"
            )
    return found


def follow_ups(crowd: Sequence[Asked], tokens: Sequence[Sequence[int]]) -> list[Asked]:
    """Each conversation goes on: what was asked, what was answered, and a little more."""
    choose = random.Random(len(crowd))
    return [
        Asked(
            dataclasses.replace(
                asked.request,
                prompt_ids=(*asked.request.prompt_ids, *answer, *_bytes(choose, 9)),
                max_tokens=12,
            )
        )
        for asked, answer in zip(crowd, tokens, strict=True)
    ]


def _bytes(choose: random.Random, length: int) -> tuple[int, ...]:
    return tuple(choose.randrange(256) for _ in range(length))
