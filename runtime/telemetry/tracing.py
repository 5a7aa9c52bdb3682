"""What an engine did and when, as a file for Perfetto (ui.perfetto.dev) or chrome://tracing.

    with Recorder.open(Path("trace.json"), layout) as recorder: ...

In the Trace Event Format (its JSON form), written event by event beside the file and put in its place at the
end; `.json.gz` is compressed. One recorder serves the running and the simulated engine: both tell it of each
micro-batch that is sent and of each group that is done, and everything else follows from that.

    ranks            a track for each stage of each KVP group, and each link: when it worked. A simulation
                     knows of all of them, a running engine of the last stages.
    micro-batches    from being sent until a group is done
    rows             the chunks and decodes in them
    requests         queued, prefill, decode, preempted; in prefill, a mark for each chunk
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from ...errors import BadInput
from ...layout import Layout
from ..protocol.messages import Done
from ..scheduling.job import Admitted, Job, MicroBatch

RANKS, MICRO_BATCHES, ROWS, REQUESTS = 1, 2, 3, 4
TITLES = {RANKS: "ranks", MICRO_BATCHES: "micro-batches", ROWS: "rows", REQUESTS: "requests"}
BUFFERED = 4096
"""Events that are written together."""


@dataclass(eq=False, slots=True)
class _Phase:
    """What a request is in, since when. last_s: its latest token; preemptions: it has suffered so far."""

    name: str
    since_s: float
    preemptions: int
    last_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Sent:
    """A micro-batch on its way. groups: how many have not answered."""

    micro_batch: MicroBatch
    at_s: float
    groups: int
    stations: int = 0


@dataclass(eq=False)
class Recorder:
    """Writes events; made by `Recorder.open`, a context manager.

    complain: told, once, that nothing more can be written; then the rest is not recorded, and no file left
    """

    path: Path
    layout: Layout
    _aside: Path
    _raw: IO[bytes]
    _packed: gzip.GzipFile | None
    _origin_s: float
    complain: Callable[[str], object] | None = None
    _events: list[str] = field(default_factory=list)
    _sent: dict[int, _Sent] = field(default_factory=dict)
    _jobs: dict[int, Job] = field(default_factory=dict)  # by sid
    _phases: dict[int, _Phase] = field(default_factory=dict)  # by request
    _worked_s: dict[int, float] = field(default_factory=dict)  # until when, by group
    _begun: bool = False

    @classmethod
    def open(
        cls,
        path: Path,
        layout: Layout,
        origin_s: float = 0.0,
        complain: Callable[[str], object] | None = None,
    ) -> Recorder:
        """origin_s: when time begins, on the engine's clock; complain: instead of raising BadInput later on.

        BadInput if nothing can be written there.
        """
        if (
            path.exists() and not path.is_file()
        ):  # a folder; or a device, which is not to be replaced
            raise BadInput("cannot write: there is something that is not a file", where=path)
        try:
            number, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except OSError as error:
            raise BadInput(f"cannot write: {error.strerror}", where=path) from error
        raw = os.fdopen(number, "wb")
        packed = gzip.GzipFile("", "wb", 1, raw, mtime=0) if path.suffix == ".gz" else None
        recorder = cls(path, layout, Path(aside), raw, packed, origin_s, complain)
        recorder._name_tracks()
        return recorder

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(keep=error is None)

    def close(self, *, keep: bool = True) -> None:
        """Finish the file, or leave none. May be called twice."""
        if keep:
            for id, phase in list(self._phases.items()):
                self._leave(id, max(phase.since_s, phase.last_s))
            self._flush()
        if self._raw.closed:
            return
        file = self._packed or self._raw
        try:
            if keep:
                file.write(b"\n]}\n")
            file.close()
            self._raw.close()
            if keep:
                self._aside.chmod(0o644)
                os.replace(self._aside, self.path)
        except OSError as error:
            self._stop(error)
        finally:
            self._aside.unlink(missing_ok=True)

    def _stop(self, error: OSError) -> None:
        """A full disk, mostly: leave it no fuller, and do not end whoever is being recorded."""
        for file in (self._packed, self._raw):
            with contextlib.suppress(OSError):  # what it still holds cannot be written either
                if file is not None:
                    file.close()
        self._aside.unlink(missing_ok=True)
        problem = BadInput(f"cannot write: {error.strerror}", where=self.path)
        if self.complain is None:
            raise problem from error
        self.complain(f"{problem}; nothing more is recorded")

    # ---------------------------------------------------------------------- what engines tell it

    def sent(self, number: int, micro_batch: MicroBatch, now_s: float) -> None:
        """A micro-batch sets out."""
        for change in micro_batch.changes:
            if isinstance(change, Admitted):
                self._admitted(change, now_s)
            elif isinstance(change, int):
                self._released(change, now_s)
        self._sent[number] = _Sent(micro_batch, now_s, len(micro_batch.loads))
        for chunk in micro_batch.chunks:
            id = str(self._jobs[chunk.sid].id)
            mark = {"rows": chunk.rows, "after": chunk.start, "micro-batch": number}
            self._event("n", REQUESTS, "chunk", now_s, id=id, cat="request", args=mark)

    def done(self, done: Done, now_s: float) -> None:
        """A group is through with it."""
        sent = self._sent[done.number]
        sent.groups -= 1
        where = f"{done.number}.{done.group}"
        title = f"{done.number}, group {done.group}" if self.layout.kvp > 1 else f"{done.number}"
        self._span(MICRO_BATCHES, f"micro-batch {title}", where, sent.at_s, now_s)
        if not sent.stations and done.busy_s > 0:
            begin_s = max(sent.at_s, now_s - done.busy_s, self._worked_s.get(done.group, 0.0))
            self._worked_s[done.group] = now_s  # replies are a little late, and may seem to overlap
            self._work(done.number, self.layout.spp - 1, done.group, begin_s, now_s, link=False)
        for sid, _ in done.tokens:
            job = self._jobs.get(sid)
            if job is not None and job.sid == sid:
                self._token(job.id, now_s)
        if not sent.groups:
            del self._sent[done.number]
            self._rows(done.number, sent, now_s)

    def lost(self) -> None:
        """The workers are gone, and with them whatever was on its way; who is preempted waits on."""
        for job in self._jobs.values():
            phase = self._phases[job.id]
            end_s = max(phase.since_s, phase.last_s)
            self._leave(job.id, end_s)
            if job.preemptions > phase.preemptions:
                self._phases[job.id] = _Phase("preempted", end_s, job.preemptions)
        self._jobs.clear()
        self._sent.clear()

    def station(
        self, number: int, stage: int, group: int, begin_s: float, end_s: float, *, link: bool
    ) -> None:
        """A stage of a group, or the link behind it, worked on a micro-batch."""
        sent = self._sent[number]
        self._work(number, stage, group, begin_s, end_s, link=link)
        if not link and self.layout.spp > 1:  # an arrow from stage to stage
            last = stage == self.layout.spp - 1
            phase = "s" if stage == 0 else "f" if last else "t"
            id, tid = number * self.layout.kvp + group, self._track(stage, group)
            flow = {"cat": "flow", "id": id, "bp": "e"}
            self._event(phase, RANKS, "next stage", begin_s, tid=tid, **flow)
        sent.stations += 1

    # --------------------------------------------------------------------------- what it makes of it

    def _admitted(self, change: Admitted, now_s: float) -> None:
        job = change.job
        self._jobs[change.sid] = job
        if job.id in self._phases:
            self._leave(job.id, now_s)
        else:
            self._span(REQUESTS, "queued", job.id, job.arrival_s, now_s, cat="request")
        self._phases[job.id] = _Phase("prefill", now_s, job.preemptions)

    def _released(self, sid: int, now_s: float) -> None:
        """A request is over, or preempted."""
        job = self._jobs.pop(sid)
        phase = self._phases[job.id]
        preempted = job.preemptions > phase.preemptions
        over_s = phase.last_s if phase.name == "decode" and not preempted else now_s
        self._leave(job.id, over_s)
        if preempted:
            self._phases[job.id] = _Phase("preempted", now_s, job.preemptions)

    def _token(self, id: int, now_s: float) -> None:
        phase = self._phases[id]
        if phase.name == "prefill":
            self._leave(id, now_s)
            phase = self._phases[id] = _Phase("decode", now_s, phase.preemptions)
        phase.last_s = now_s

    def _leave(self, id: int, end_s: float) -> None:
        """A request's phase ends."""
        phase = self._phases.pop(id)
        self._span(REQUESTS, phase.name, id, phase.since_s, end_s, cat="request")

    def _rows(self, number: int, sent: _Sent, now_s: float) -> None:
        batch = sent.micro_batch
        if batch.decodes:
            name = f"{len(batch.decodes)} decodes"
            self._span(ROWS, name, f"{number}.decodes", sent.at_s, now_s)
        for chunk in batch.chunks:
            name = f"chunk of {chunk.rows} after {chunk.start}"
            self._span(ROWS, name, f"{number}.{chunk.sid}", sent.at_s, now_s)

    def _work(
        self, number: int, stage: int, group: int, begin_s: float, end_s: float, *, link: bool
    ) -> None:
        sent = self._sent[number].micro_batch
        what = {"micro-batch": number, "rows": sent.loads[group].T, "decodes": len(sent.decodes)}
        name = "hop" if link else f"{number}"
        dur = round(max(0.0, end_s - begin_s) * 1e6, 3)
        tid = self._track(stage, group, link=link)
        self._event("X", RANKS, name, begin_s, tid=tid, args=what, dur=dur)

    def _span(
        self,
        pid: int,
        name: str,
        id: int | str,
        begin_s: float,
        end_s: float,
        cat: str = "batch",
    ) -> None:
        """Something that lasts, on a track of its own."""
        self._event("b", pid, name, begin_s, id=str(id), cat=cat)
        self._event("e", pid, name, max(begin_s, end_s), id=str(id), cat=cat)

    def _event(self, phase: str, pid: int, name: str, at_s: float, **more: object) -> None:
        if self._raw.closed:
            return
        stamp = round((at_s - self._origin_s) * 1e6, 3)
        event = {"ph": phase, "pid": pid, "tid": 0, "ts": stamp, "name": name, **more}
        self._events.append(json.dumps(event))
        if len(self._events) >= BUFFERED:
            self._flush()

    def _flush(self) -> None:
        head = '{"displayTimeUnit": "ms", "traceEvents": [\n' if not self._begun else ",\n"
        events, self._events = self._events, []
        if events and not self._raw.closed:
            try:
                (self._packed or self._raw).write((head + ",\n".join(events)).encode())
            except OSError as error:
                self._stop(error)
            self._begun = True

    def _track(self, stage: int, group: int, *, link: bool = False) -> int:
        """The number of a thread among the ranks: links come behind the stages."""
        return 1 + (stage + (self.layout.spp if link else 0)) * self.layout.kvp + group

    def _name_tracks(self) -> None:
        at_s = self._origin_s
        for pid, title in TITLES.items():
            self._event("M", pid, "process_name", at_s, args={"name": title})
            self._event("M", pid, "process_sort_index", at_s, args={"sort_index": pid})
        stages, groups = range(self.layout.spp), range(self.layout.kvp)
        for link, stage, group in itertools.product((False, True), stages, groups):
            if link and stage == self.layout.spp - 1:
                continue
            name = f"link behind stage {stage}" if link else f"stage {stage}"
            name += f", group {group}" if self.layout.kvp > 1 else ""
            tid = self._track(stage, group, link=link)
            self._event("M", RANKS, "thread_name", at_s, tid=tid, args={"name": name})
            self._event("M", RANKS, "thread_sort_index", at_s, tid=tid, args={"sort_index": tid})
