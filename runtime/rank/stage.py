"""One rank's stage of a plan: what it holds, and how it carries out micro-batches.

    prepare   the replicated state brought up to date, the batch built, the receive of its rows posted
    launch    pages copied to host memory or back, its program run; rows on their way to the next stage, or
              tokens chosen, and on theirs to the host
    finish    what the engine is to hear, once it is there

A micro-batch is prepared while the one before is computed, so that its rows cross the link meanwhile. On a
GPU nothing here waits for the device but `finish`, and that only for its own micro-batch.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import BadInput, RuntimeFault
from ...folder import load_artifact
from ...microbatch import Batch
from ..loader import ArtifactModules
from ..protocol.messages import Copies, Done, Step
from ..scheduling.growth import Growth
from .batch import Batches, Wanted
from .graphs import Graphs, cuda_capture
from .host_pages import HostPages
from .sampling import Chosen, Draw, choose
from .sequences import Sequences
from .settings import Settings
from .surroundings import Surroundings
from .transfer import to_host


@dataclass(frozen=True)
class Prepared:
    """A group's part of a step. arriving: its rows from the stage before, and their pending receive.

    copies: of pages, before the program runs; batch: None where they are all there is to do
    """

    number: int
    copies: list[Copies]
    batch: Batch | None
    wanted: list[Wanted]
    arriving: tuple[torch.Tensor, Any] | None


@dataclass(frozen=True)
class Launched:
    """What a micro-batch yields: tokens chosen, and logits [R, vocab] where anybody is to have them.

    ready: when both are on the host, or None where they are at once
    """

    number: int
    wanted: list[Wanted]
    started_s: float
    chosen: Chosen
    logits: torch.Tensor | None
    ready: torch.cuda.Event | None


class Stage:
    """A rank's program, weights, KV cache and replicated state.

    answers: whether this rank tells the engine of its stage's micro-batches
    """

    def __init__(self, settings: Settings, surroundings: Surroundings | None = None) -> None:
        manifest, contents = load_artifact(settings.artifact)
        plan, layout = manifest.plan, manifest.plan.layout
        if settings.world != layout.gpus:
            raise RuntimeFault(
                f"{settings.world} workers run, the plan ({layout}) is for {plan.gpus}"
            )
        given = surroundings or Surroundings(settings)
        stage, self.group, tp_rank = layout.coordinates(settings.rank)
        self.first, self.last = stage == 0, stage == layout.spp - 1
        self.answers = self.last and tp_rank == 0
        self.device = _device(plan.target, settings)
        given.settle(self.device)
        role = plan.stages[stage].role
        wanted = ("kernels/", f"schedule/{role}.py", "schedule/__init__", "schedule/collectives")
        self.program = ArtifactModules(settings.artifact, contents, wanted).load(f"schedule.{role}")
        self.weights = given.weights(self.program, layout, self.device)
        layers, pages = range(self.program.NUM_LAYERS), given.num_pages(plan)
        self.kv = [_caches(self.program, pages, self.device) for _ in layers]
        growth = Growth.of(plan)
        self.host_pages = HostPages(self.kv, plan.host_pages)
        self.sequences = Sequences(growth, self.group, plan.page_size, self.device)
        peers = [layout.rank(stage, group, tp_rank) for group in range(layout.kvp)]
        rows = plan.overlap_rows
        self.batches = Batches(growth, plan.page_size, peers, self.device, rows)
        self.comm = given.connect(plan, self.program, self.device)
        self._eos = frozenset(manifest.model["eos"])
        self._max_sends = layout.spp + 1
        self._sends: deque[Any] = deque()
        cuda = self.device.type == "cuda"
        self._step = Graphs(self._run, cuda_capture()) if cuda and not plan.eager else self._run
        self._receiving = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]

    @property
    def ahead(self) -> int:
        """How many micro-batches may be launched before the first of them is finished."""
        return 2 if self.device.type == "cuda" else 1

    def prepare(self, step: Step) -> Prepared | None:
        """The group's part of a step, if it has one."""
        decodes, chunks, copies = self.sequences.apply(step)
        if not decodes and not chunks:
            return Prepared(step.number, copies, None, [], None) if copies else None
        batch, wanted = self.batches.build(decodes, chunks)
        arriving = None if self.first else self._receive(batch)
        return Prepared(step.number, copies, batch, wanted, arriving)

    def _receive(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Posted on a stream of its own: on the computing one it would wait for what is queued there."""
        stream = self._receiving
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            rows, work = self.program.receive(batch.pos.shape[0], self.device, self.comm)
        if stream is not None:
            rows.record_stream(torch.cuda.current_stream())
        return rows, work

    def launch(self, prepared: Prepared) -> Launched | None:
        """Run the program; what will be there to finish, if it is this rank that tells the engine."""
        started_s = time.perf_counter()
        for copies in prepared.copies:
            self.host_pages.carry_out(copies)
        if prepared.batch is None:
            return None
        arrived: tuple[torch.Tensor, ...] = ()
        if prepared.arriving is not None:
            rows, work = prepared.arriving
            work.wait()
            arrived = (rows,)
        result = self._step(prepared.batch, *arrived)
        if not self.last:
            self._sends.append(self.program.send(result, self.comm))
            if len(self._sends) > self._max_sends:
                self._sends.popleft().wait()
        return self._results(prepared, result, started_s) if self.answers else None

    def _run(self, batch: Batch, *arrived: torch.Tensor) -> torch.Tensor | None:
        result: torch.Tensor | None = self.program.step(
            self.weights, self.kv, batch, self.comm, *arrived
        )
        return result

    def _results(
        self, prepared: Prepared, logits_RV: torch.Tensor | None, started_s: float
    ) -> Launched:
        """Tokens chosen; they, and logits that are to be sent, on their way to the host."""
        wanted = prepared.wanted
        draws = [
            Draw(w.first + w.count - 1, w.sequence.sampling, w.sequence.history)
            for w in wanted
            if w.sample
        ]
        chosen = Chosen(torch.empty(0, dtype=torch.int64))
        if logits_RV is not None and draws:
            chosen = choose(logits_RV, draws, self._eos)
        if not any(w.send for w in wanted):
            logits_RV = None
        if self.device.type == "cpu":
            return Launched(prepared.number, wanted, started_s, chosen, logits_RV, None)
        chosen = chosen.to_host()
        logits_RV = None if logits_RV is None else to_host(logits_RV)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Launched(prepared.number, wanted, started_s, chosen, logits_RV, ready)

    def finish(self, launched: Launched) -> Done:
        """Sampled tokens and logits of a micro-batch that this rank answers for."""
        if launched.ready is not None:
            launched.ready.synchronize()
        sampled = [want.sequence for want in launched.wanted if want.sample]
        ids = launched.chosen.tokens.tolist()
        tokens = [(sequence.id, id) for sequence, id in zip(sampled, ids, strict=True)]
        logprobs = [
            (sequence.id, *launched.chosen.logprobs(i, sequence.sampling.logprobs))
            for i, sequence in enumerate(sampled)
            if sequence.sampling.logprobs is not None
        ]
        sent = []
        for want in launched.wanted:
            if want.send:
                assert launched.logits is not None, "whoever sends has the logits copied"
                rows = launched.logits[want.first : want.first + want.send]
                data = rows.contiguous().numpy().tobytes()
                sent.append((want.sequence.id, want.position, data))
        busy_s = time.perf_counter() - launched.started_s
        return Done(launched.number, self.group, tokens, sent, busy_s, logprobs)


def _device(target: str, settings: Settings) -> torch.device:
    if target == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput(
            f"the plan is for {target}, and no CUDA device is here",
            do="plan with --target cpu for this machine",
        )
    torch.cuda.set_device(settings.local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def _caches(program: Any, pages: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V pages of a layer. On a CPU the memory is only taken as it is written."""
    make = torch.empty if device.type == "cpu" else torch.zeros
    dtype = getattr(torch, program.KV_DTYPE)
    heads, _, page_size, dim = program.KV_SHAPE
    shape = (heads, pages, page_size, dim)
    key, value = (make(shape, dtype=dtype, device=device) for _ in range(2))
    return key, value
