"""What happens to requests and workers, told to whoever writes it down: a log, an exporter of traces.

The engine's thread makes a small record and goes on. One thread of our own does the rest; behind a disk or
a collector that is too slow, records are dropped and counted, and nothing waits.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...errors import MnemocError
from ..request import FinishReason, Handle, Origin
from ..scheduling.job import Job
from ..telemetry.witness import Witness

WAITING = 8192
"""Records that may wait to be written."""
AT_ONCE = 256
"""That are written together."""
LAST_S = 5.0
"""How long closing waits for them."""

Field = str | float | int | bool | None


@dataclass(frozen=True)
class Account:
    """All that is told of a request, and nothing of what it says. Times on time.monotonic's clock."""

    origin: Origin
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    max_tokens: int
    temperature: float
    top_p: float
    submitted_s: float
    scheduled_s: float | None
    first_token_s: float | None
    predicted_ttft_s: float | None
    deadline_s: float
    tbt_s: float
    late_tokens: int
    preemptions: int
    home: int | None
    now_s: float
    finish: str = ""
    error: str = ""

    @classmethod
    def of(cls, job: Job, handle: Handle, finish: str = "", error: str = "") -> Account:
        request = handle.request
        return cls(
            request.origin,
            len(request.prompt_ids),
            handle.cached_tokens,
            job.tokens,
            request.max_tokens,
            request.sampling.temperature,
            request.sampling.top_p,
            job.arrival_s,
            job.started_s,
            job.first_token_s,
            handle.predicted_ttft_s,
            job.deadline_s,
            job.tbt_s,
            job.late,
            job.preemptions,
            job.home if job.sid >= 0 else None,
            time.monotonic(),
            finish,
            error,
        )

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.submitted_s

    @property
    def in_time(self) -> bool:
        """Whether the first token came when it was due, or is not due yet."""
        return (self.first_token_s or self.now_s) - self.submitted_s <= self.deadline_s


@dataclass(frozen=True)
class Entry:
    """Something that happened. time_s: Unix time; account: the request's, if it is about one"""

    time_s: float
    level: str
    event: str
    fields: Mapping[str, Field]
    account: Account | None = None


class Writer(Protocol):
    """Whoever writes entries down, in the chronicle's thread. lost: those that it could not write"""

    lost: int

    def write(self, entries: Sequence[Entry]) -> None: ...

    def close(self) -> None: ...


class Chronicle(Witness):
    """A witness with a thread; a context manager."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._dropped = 0
        self._writers = writers
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mnemoc-chronicle", daemon=True)
        self._thread.start()

    def __enter__(self) -> Chronicle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def missing(self) -> int:
        """Entries for which there was no room, and those that could not be written."""
        return self._dropped + sum(writer.lost for writer in self._writers)

    def close(self) -> None:
        """Write what is left, unless whoever writes hangs."""
        self._entries.put(None)
        self._thread.join(LAST_S)

    def note(self, level: str, event: str, **fields: Field) -> None:
        """Something that is about no request. From any thread; never waits."""
        self._put(Entry(time.time(), level, event, fields))

    def came(self, job: Job, handle: Handle) -> None:
        account = Account.of(job, handle)
        self._tell(
            "info",
            "received",
            account,
            predicted_ttft_s=account.predicted_ttft_s,
            promised_ttft_s=job.deadline_s,
            promised_tbt_s=job.tbt_s,
        )

    def admitted(self, job: Job, handle: Handle) -> None:
        account = Account.of(job, handle)
        waited_s = account.now_s - job.arrival_s
        again = job.preemptions or None
        self._tell("info", "admitted", account, after_s=waited_s, group=job.home, preemptions=again)

    def first_token(self, job: Job, handle: Handle) -> None:
        account = Account.of(job, handle)
        self._tell("info", "first_token", account, ttft_s=account.ttft_s, in_time=account.in_time)

    def broken(self, job: Job, handle: Handle) -> None:
        account = Account.of(job, handle)
        if job.late:
            which: dict[str, Field] = {"promise": "tbt", "promised_s": job.tbt_s}
        else:
            which = {"promise": "ttft", "promised_s": job.deadline_s, "took_s": account.ttft_s}
        self._tell("warning", "promise_missed", account, **which)

    def ended(
        self, job: Job, handle: Handle, reason: FinishReason | None, error: MnemocError | None
    ) -> None:
        account = Account.of(job, handle, reason or "error", str(error or ""))
        self._tell(
            "error" if error else "info",
            "ended",
            account,
            finish_reason=account.finish,
            error=account.error or None,
            generated_tokens=account.generated_tokens,
            cached_tokens=account.cached_tokens,
            predicted_ttft_s=account.predicted_ttft_s,
            ttft_s=account.ttft_s,
            e2e_s=account.now_s - account.submitted_s,
            in_time=account.in_time,
            late_tokens=account.late_tokens,
            preemptions=account.preemptions,
        )

    def lost(self, error: MnemocError) -> None:
        self.note("error", "workers_lost", error=str(error), notes="\n".join(_notes(error)) or None)

    def back(self) -> None:
        self.note("info", "workers_up")

    def _tell(self, level: str, event: str, account: Account, **fields: Field) -> None:
        self._put(Entry(time.time(), level, event, fields, account))

    def _put(self, entry: Entry) -> None:
        if self._entries.qsize() < WAITING:
            self._entries.put(entry)
        else:
            self._dropped += 1

    def _run(self) -> None:
        open = True
        while open:
            batch = [self._entries.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < AT_ONCE:
                    batch.append(self._entries.get_nowait())
            open = None not in batch
            entries = [entry for entry in batch if entry is not None]
            for writer in self._writers:
                writer.write(entries)
        for writer in self._writers:
            writer.close()


class Relay(logging.Handler):
    """What Python's own loggers say (the HTTP server's, our own) becomes entries too."""

    def __init__(self, chronicle: Chronicle) -> None:
        super().__init__(logging.WARNING)
        self._chronicle = chronicle

    def emit(self, record: logging.LogRecord) -> None:
        trace = record.exc_info and "".join(traceback.format_exception(*record.exc_info))
        level, message = record.levelname.lower(), record.getMessage()
        fields: dict[str, Field] = {"logger": record.name, "message": message}
        self._chronicle.note(level, "message", **fields, trace=trace or None)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
