"""Any one rank of a plan, alone on one device: its own program, measured against the plan's cost function.

    with Replay.open(directory, Asked(rank=5)) as replay:
        outcome = replay.run()

The rank runs as a worker does (`stage.Stage`: verified artifact, emitted program, replicated state of
requests), among the stand-ins of `alone`. What is cached before a micro-batch is random and costs no time to
come by: so a prompt of millions of tokens is sampled at a few of its chunks (`walk`), each of which runs
several times.

Two things are left out of a measured time, and of the prediction that it is held against: messages between
ranks (the part "communication"), and what it took here to write what peers would have sent.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ...artifact import Memory, Plan
from ...folder import load_artifact
from ...layout import Layout
from ...units import format_count
from ..loader import ArtifactModules
from ..protocol.messages import Admission, Run, Step
from ..rank.settings import Settings
from ..rank.stage import Launched, Stage
from ..request import Sampling
from .alone import Alone, Supply, fill_normal, weight_bytes
from .walk import Asked, MicroBatch, Walk

REPEATS = 3
"""Measured runs of each micro-batch; the median counts. Two warm up: the second captures a CUDA graph."""


class Progress(Protocol):
    """Told what is being done and, where it is known, the fraction that is done."""

    def __call__(self, what: str, fraction: float | None = None) -> None: ...


def _unseen(what: str, fraction: float | None = None) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Measured:
    """A micro-batch on this rank: seconds without messages, and what was left out of either.

    error: predicted over measured, less 1
    supplied_s: what writing the peers' messages took here; messages_s: what the plan says they take
    """

    batch: MicroBatch
    measured_s: float
    predicted_s: float
    error: float
    supplied_s: float
    messages_s: float


@dataclass(frozen=True)
class Held:
    """Bytes on the device.

    step_bytes: what micro-batches took beside, at most; None on a CPU, where nobody counts
    planned: of the plan's fullest rank, with `planned_pages` KV pages
    """

    weights_bytes: int
    kv_bytes: int
    pages: int
    step_bytes: int | None
    planned: Memory
    planned_pages: int


@dataclass(frozen=True)
class Outcome:
    """A replay. median_error, worst_error: of |predicted over measured, less 1| over the micro-batches."""

    layout: Layout
    rank: int
    stage: int
    group: int
    tp_rank: int
    device: str
    weights: str
    prompt: int
    micro_batches: tuple[Measured, ...]
    median_error: float
    worst_error: float
    memory: Held


class Replay:
    """A rank, and the micro-batches that it is asked to run. Made by `Replay.open`; a context manager."""

    def __init__(self, asked: Asked, plan: Plan, walk: Walk, stage: Stage, peers: Supply) -> None:
        self.asked = asked
        self.plan = plan
        self.walk = walk
        self.stage = stage
        self._peers = peers
        self._before_bytes = 0  # on a GPU, before any micro-batch

    @classmethod
    def open(cls, directory: Path, asked: Asked, progress: Progress = _unseen) -> Replay:
        """Verify the artifact, load the rank's program, its weights and its pages.

        Raises BadInput for what is no plan or has no room here, UsageError for what the plan or this rank
        cannot do, RuntimeFault where the plan's kind of device is missing.
        """
        manifest, contents = load_artifact(directory)
        plan, needs = manifest.plan, manifest.plan.memory
        cost = ArtifactModules(directory, contents, ["cost.py"]).load("cost")
        walk = Walk.of(manifest, cost, asked)
        weights = asked.weights or Path()
        settings = Settings(asked.rank, 0, plan.gpus, "", "", directory, weights, threads())
        alone = Alone(
            settings,
            pages=walk.pages,
            step_bytes=needs.activation_bytes + needs.workspace_bytes + needs.communication_bytes,
            real=asked.weights is not None,
            seed=asked.seed,
        )
        progress(f"loading rank {asked.rank} of {plan.gpus}")
        try:
            with torch.inference_mode():
                replay = cls(asked, plan, walk, Stage(settings, alone), alone.supply)
                replay._prepare(int(manifest.model["vocab"]))
                return replay
        except BaseException:
            _leave()
            raise

    def run(self, progress: Progress = _unseen) -> Outcome:
        """Run and measure all micro-batches of the walk."""
        expected_s = [self.walk.predict(batch)[0] for batch in self.walk.micro_batches]
        found = []
        for i, batch in enumerate(self.walk.micro_batches):
            fraction = sum(expected_s[:i]) / sum(expected_s)
            progress(f"{batch.kind} after {format_count(batch.cached)}", fraction)
            found.append(self.measure(batch))
        errors = [abs(one.error) for one in found]
        return Outcome(
            self.plan.layout,
            self.asked.rank,
            *self.plan.layout.coordinates(self.asked.rank),
            _name(self.stage.device),
            str(self.asked.weights or f"random, seed {self.asked.seed}"),
            self.walk.prompt,
            tuple(found),
            statistics.median(errors),
            max(errors),
            self._held(),
        )

    def measure(self, batch: MicroBatch) -> Measured:
        """The median of several runs of one micro-batch, after two that are not counted."""
        device, peers = self.stage.device, self._peers
        peers.given.clear()
        self.execute(batch)
        given = [
            torch.empty(shape, dtype=dtype, device=device) for shape, dtype in list(peers.given)
        ]
        self.execute(batch)
        whole_s = statistics.median(_seconds(device, lambda: self.execute(batch)))
        supplied_s = 0.0
        if given:
            supplied_s = statistics.median(_seconds(device, lambda: peers.fill_all(given)))
        measured_s = whole_s - supplied_s
        predicted_s, messages_s = self.walk.predict(batch)
        error = predicted_s / measured_s - 1
        return Measured(batch, measured_s, predicted_s, error, supplied_s, messages_s)

    def execute(self, batch: MicroBatch) -> Launched | None:
        """Run a micro-batch, whatever ran before it: as far as without waiting for the device."""
        ids = range(batch.rows if batch.kind == "decode" else 1)
        for id in ids:
            self.stage.sequences.set_length(id, batch.cached)
        decodes = [(id, 0) for id in ids] if batch.kind == "decode" else []
        chunks = [(0, batch.rows)] if batch.kind == "prefill" else []
        with torch.inference_mode():
            prepared = self.stage.prepare(Step(0, (), decodes, chunks))
            assert prepared is not None, "the walk has only what concerns this rank"
            return self.stage.launch(prepared)

    def close(self) -> None:
        """Leave the world that the rank is alone in."""
        _leave()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prepare(self, vocab: int) -> None:
        """Random keys and values in all pages, and the requests with random prompts."""
        stage, walk = self.stage, self.walk
        generator = torch.Generator(stage.device).manual_seed(self.asked.seed)
        for pair in stage.kv:
            for cache in pair:
                fill_normal(cache, 1.0, generator)
        ids = torch.randint(vocab, (walk.prompt,), dtype=torch.int32)
        prompt = array("i", ids.numpy().tobytes())
        shard, most = walk.shard, walk.prompt + 1
        each = -(-walk.growth.held(shard, most) // self.plan.page_size)
        new = [
            Admission(id, walk.home, most, Sampling(), "none", prompt, 0, 0, self._pages(id, each))
            for id in range(max(1, self.asked.decodes))
        ]
        stage.sequences.apply(Step(0, new))
        if stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(stage.device)
            self._before_bytes = torch.cuda.memory_allocated(stage.device)

    def _pages(self, id: int, each: int) -> tuple[tuple[Run, ...], ...]:
        """A request's pages on this rank's group: behind those of the one before it."""
        groups = range(self.plan.layout.kvp)
        return tuple(((id * each, each),) if group == self.stage.group else () for group in groups)

    def _held(self) -> Held:
        stage, step_bytes = self.stage, None
        if stage.device.type == "cuda":
            step_bytes = torch.cuda.max_memory_allocated(stage.device) - self._before_bytes
        return Held(
            weight_bytes(stage.weights),
            sum(cache.nbytes for pair in stage.kv for cache in pair),
            self.walk.pages,
            step_bytes,
            self.plan.memory,
            self.plan.num_pages,
        )


def threads() -> int:
    """torch's threads of a rank on a CPU: as many as a worker has."""
    return int(os.environ.get("MNEMOC_THREADS", "1"))


def _seconds(device: torch.device, run: Callable[[], object]) -> list[float]:
    """Of several runs, one behind the other: on a GPU none waits for the last, as in a full pipeline."""
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(REPEATS):
            run()
            marks.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(marks)]
    torch.cuda.synchronize(device)
    kind: Any = torch.cuda.Event  # untyped
    events = [kind(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
