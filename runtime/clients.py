"""The requests that are not over, and what their clients hear: tokens, progress, the end.

Events are written down as they come and handed over by `deliver`, when workers are at work again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..artifact import Manifest
from ..errors import MnemocError
from .blame import Blame
from .protocol.messages import Done
from .request import Ended, Event, FinishReason, Handle, Progress, Sink, Token, now_s
from .scheduling.job import Admitted, Chunk, Job
from .scheduling.prefix import page_hash
from .scheduling.scheduler import Scheduler
from .telemetry.stats import ALLOWED_S, Stats
from .telemetry.witness import Witness


class Clients:
    """Of one engine. handles, jobs: by the requests' ids; witness: is told of what happens to them"""

    def __init__(
        self, manifest: Manifest, scheduler: Scheduler, stats: Stats, blame: Blame
    ) -> None:
        self.handles: dict[int, Handle] = {}
        self.jobs: dict[int, Job] = {}
        self.witness = Witness()
        self._scheduler = scheduler
        self._stats = stats
        self._blame = blame
        self._page_size = manifest.plan.page_size
        self._eos = frozenset(manifest.model["eos"])
        self._outbox: list[tuple[Sink, Event]] = []

    # ---------------------------------------------------------------------- requests come and go

    def add(self, handle: Handle) -> Job:
        """A new request, for the scheduler too."""
        request, stops = handle.request, handle.request.sampling.stop_ids
        if not request.sampling.ignore_eos:
            stops = stops | self._eos if stops else self._eos
        handle.ends = stops
        self.handles[handle.id] = handle
        self.jobs[handle.id] = job = self._scheduler.add(
            handle.id,
            len(request.prompt_ids),
            request.kv_tokens,
            handle.submitted_s,
            request.promise,
            handle.hashes,
        )
        return job

    def admitted(self, change: Admitted) -> Handle:
        """It has pages: whose request that is."""
        handle = self.handles[change.job.id]
        if handle.scheduled_s is None:
            handle.scheduled_s = change.job.started_s
        if not change.job.preemptions:
            handle.cached_tokens = change.cached
        self.witness.admitted(change.job, handle)
        if handle.hashes is not None and not change.generated and not change.job.preemptions:
            self._stats.prefix_queries += len(handle.request.prompt_ids)
            self._stats.prefix_hits += change.cached
        return handle

    def refuse(self, job: Job, why: MnemocError) -> None:
        """Its strict promise cannot be kept."""
        self._stats.refused += 1
        self._scheduler.drop(job)
        self._post(self.handles[job.id], Ended(why))
        self._forget(job.id)

    def cancel(self, id: int) -> None:
        """The client lost interest, or has what it wanted; its pages are free at once."""
        if id in self.handles:
            self.end(id, None)

    def end(self, id: int, error: MnemocError | None) -> None:
        """It failed; or, without an error, nobody wants more of it."""
        job, handle = self.jobs[id], self.handles[id]
        reason = None if error else handle.finish_reason or "cancelled"
        self._over(job, handle, reason, error, now_s())
        self._scheduler.drop(job)
        self._post(handle, Ended(error))
        self._forget(id)

    def fail_all(self, error: MnemocError) -> None:
        for id in list(self.handles):
            self.end(id, error)

    # ------------------------------------------------------------------------------ what they hear

    def note(self, done: Done, now_s: float) -> list[int]:
        """What a group made of a micro-batch, tokens in few steps: there are thousands a second. Of requests
        preempted since it counts for nothing. The sids that want another token."""
        running, handles = self._scheduler.running, self.handles
        for sid, position, rows in done.logits:
            if (job := running.get(sid)) is not None:
                handles[job.id].logits_bytes[position] = rows
        outbox = self._outbox
        likely = {sid: (logprob, top) for sid, logprob, top in done.logprobs}
        late_s = now_s - ALLOWED_S
        before: list[float] = []  # of later tokens, when the one before came
        going_on = []
        for sid, id in done.tokens:
            if (job := running.get(sid)) is None:
                continue
            handle, index = handles[job.id], job.tokens
            request = handle.request
            job.tokens = count = index + 1
            if index:
                before.append(handle.token_times_s[-1])
                if job.due_s < late_s and self._stats.late_token(job):
                    self.witness.broken(job, handle)
                job.due_s += job.tbt_s
            else:
                job.begin(now_s)
                self.witness.first_token(job, handle)
                if self._stats.first_token(job, handle, now_s):
                    self.witness.broken(job, handle)
            handle.tokens.append(id)
            handle.token_times_s.append(now_s)
            token = Token(id, index, now_s)
            if likely and sid in likely:
                handle.logprobs.append(likely[sid])
                token.logprob, token.top_logprobs = likely[sid]
            outbox.append((handle.hand_over, token))
            finish: FinishReason | None = None
            if count >= request.max_tokens or id in handle.ends:
                finish = _finish(handle, id, count)
            if finish is None:
                going_on.append(sid)
            else:
                token.finish = handle.finish_reason = finish
                self._over(job, handle, finish, None, now_s)
                self._scheduler.drop(job)
                self._forget(job.id)
        self._stats.later_tokens(Counter(before), now_s)
        return going_on

    def progress(self, chunks: Iterable[Chunk], now_s: float) -> None:
        """These chunks are through; of a prompt's last one its first token speaks."""
        for chunk in chunks:
            job = self._scheduler.running.get(chunk.sid)
            if job is not None and not chunk.ends:
                progress = Progress(job.processed, job.prompt, job.eta_s(chunk.left_s, now_s))
                self._post(self.handles[job.id], progress)

    def deliver(self) -> None:
        """Hand events to the clients; done when the workers are at work again, not before."""
        events, self._outbox = self._outbox, []
        for hand_over, event in events:
            hand_over(event)

    def name_pages(self) -> None:
        """Pages that decodes have filled get their hashes: others can find them from now on.

        Two at once where a preempted request's last token had filled a page, computed with the prompt then.
        """
        filled, self._scheduler.filled = self._scheduler.filled, []
        for job in filled:
            assert job.hashes is not None, "only jobs that share are listed"
            handle = self.handles[job.id]
            prompt = len(handle.request.prompt_ids)
            for start in range(
                len(job.hashes) * self._page_size, job.cached - self._page_size + 1, self._page_size
            ):
                end = start + self._page_size
                tokens = [
                    *handle.request.prompt_ids[start:end],
                    *handle.tokens[max(0, start - prompt) : max(0, end - prompt)],
                ]
                job.hashes.append(page_hash(job.hashes[-1] if job.hashes else b"", tokens))
            self._scheduler.book.fill(job.sid, job.hashes, job.cached)

    def _over(
        self,
        job: Job,
        handle: Handle,
        reason: FinishReason | None,
        error: MnemocError | None,
        now_s: float,
    ) -> None:
        self._stats.ended(job, handle, reason, now_s)
        self.witness.ended(job, handle, reason, error)

    def _forget(self, id: int) -> None:
        """Nothing more is posted to it. Whoever listens may know the handle: the two would keep each other,
        and all the prompt's tokens, until the garbage collector comes.
        """
        self._blame.over(id)
        del self.jobs[id]
        self.handles.pop(id).hand_over = _nobody

    def _post(self, handle: Handle, event: Progress | Ended) -> None:
        handle.record(event)
        self._outbox.append((handle.hand_over, event))


def _finish(handle: Handle, token: int, count: int) -> FinishReason | None:
    """Whether its latest token is the last one, and why."""
    if token in handle.ends and count >= handle.request.sampling.min_tokens:
        return "stop"
    return "length" if count == handle.request.max_tokens else None


def _nobody(event: Event) -> None:
    """Is left to hear it."""
