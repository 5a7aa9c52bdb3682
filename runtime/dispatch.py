"""From the scheduler's micro-batches to the steps that workers understand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .protocol.messages import Admission, Step
from .protocol.messages import Change as WorkersChange
from .request import Handle
from .scheduling.job import Admitted, Change, MicroBatch


@dataclass(frozen=True)
class Dispatch:
    """The executor in front of real workers. send_step: to all of them."""

    send_step: Callable[[Step], None]

    def send(self, number: int, micro_batch: MicroBatch, handles: Mapping[int, Handle]) -> None:
        self.send_step(
            Step(
                number,
                [_told(change, handles) for change in micro_batch.changes],
                [(sid, handles[sid].tokens[-1]) for sid in micro_batch.decodes],
                [(chunk.sid, chunk.rows) for chunk in micro_batch.chunks],
            )
        )


def _told(change: Change, handles: Mapping[int, Handle]) -> WorkersChange:
    """A change as workers hear it: an admission with its tokens."""
    if not isinstance(change, Admitted):
        return change
    handle, generated = handles[change.sid], change.generated
    request = handle.request
    tokens, logits = request.prompt_ids, request.logits
    if generated:
        tokens = list(itertools.chain(tokens, handle.tokens[:generated]))
    if change.job.preemptions and logits not in ("none", "last"):  # all rows come once more
        handle.logits_bytes.clear()
        if isinstance(logits, tuple):
            first = len(request.prompt_ids) - 1
            logits = (*logits, *range(first, first + generated))
    return Admission(
        change.sid,
        change.home,
        change.job.kv_tokens,
        request.sampling,
        logits,
        tokens,
        generated,
        change.cached,
        change.pages,
    )
