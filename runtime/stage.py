"""One rank's stage of a plan: what it holds, and how it carries out micro-batches.

    prepare   the replicated state brought up to date, the batch built, the receive of its rows posted
    launch    its program run; rows on their way to the next stage, or tokens on theirs to the host
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

from .. import artifact
from ..errors import RuntimeFault
from ..microbatch import Batch
from .batch import Batches, Wanted
from .graphs import Graphs, cuda_capture
from .growth import Growth
from .loader import ArtifactModules
from .protocol import Done, Step
from .sampling import sample
from .sequences import Sequences
from .settings import Settings
from .surroundings import Surroundings
from .transfer import to_host


@dataclass(frozen=True)
class Prepared:
    """A group's part of a step. arriving: its rows from the stage before, and their pending receive."""

    number: int
    batch: Batch
    wanted: list[Wanted]
    arriving: tuple[torch.Tensor, Any] | None


@dataclass(frozen=True)
class Launched:
    """What a micro-batch yields: greedy tokens [R], and logits [R, vocab] where anybody needs them.

    ready: when both are on the host, or None where they are at once
    """

    number: int
    wanted: list[Wanted]
    started_s: float
    greedy: torch.Tensor
    logits: torch.Tensor | None
    ready: torch.cuda.Event | None


class Stage:
    """A rank's program, weights, KV cache and replicated state.

    answers: whether this rank tells the engine of its stage's micro-batches
    """

    def __init__(self, settings: Settings, surroundings: Surroundings | None = None) -> None:
        manifest, contents = artifact.load(settings.artifact)
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
        self.sequences = Sequences(growth, self.group, pages, plan.page_size, self.device)
        peers = [layout.rank(stage, group, tp_rank) for group in range(layout.kvp)]
        self.batches = Batches(growth, plan.page_size, peers, self.device)
        self.comm = given.connect(layout, self.device)
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
        decodes, chunks = self.sequences.apply(step)
        if not decodes and not chunks:
            return None
        batch, wanted = self.batches.build(decodes, chunks)
        return Prepared(step.number, batch, wanted, None if self.first else self._receive(batch))

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
        """On their way to the host."""
        wanted = prepared.wanted
        greedy = torch.empty(0, dtype=torch.int64) if logits_RV is None else logits_RV.argmax(1)
        if all(w.send == 0 and w.sequence.sampling.temperature == 0 for w in wanted):
            logits_RV = None
        if self.device.type == "cpu":
            return Launched(prepared.number, wanted, started_s, greedy, logits_RV, None)
        greedy = to_host(greedy)
        logits_RV = None if logits_RV is None else to_host(logits_RV)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Launched(prepared.number, wanted, started_s, greedy, logits_RV, ready)

    def finish(self, launched: Launched) -> Done:
        """Sampled tokens and logits of a micro-batch that this rank answers for."""
        if launched.ready is not None:
            launched.ready.synchronize()
        tokens, sent = [], []
        for want in launched.wanted:
            last, sampling = want.first + want.count - 1, want.sequence.sampling
            if want.sample and sampling.temperature == 0:
                tokens.append((want.sequence.id, int(launched.greedy[last])))
            elif want.sample:
                assert launched.logits is not None, "whoever samples has the logits copied"
                position = want.sequence.length
                tokens.append((want.sequence.id, sample(launched.logits[last], sampling, position)))
            if want.send:
                assert launched.logits is not None, "whoever sends has the logits copied"
                rows = launched.logits[want.first : want.first + want.send]
                sent.append((want.sequence.id, rows.contiguous().numpy().tobytes()))
        busy_s = time.perf_counter() - launched.started_s
        return Done(launched.number, self.group, tokens, sent, busy_s)


def _device(target: str, settings: Settings) -> torch.device:
    if target == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeFault(
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
