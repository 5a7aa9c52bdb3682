"""One rank: `python -m mnemoc.runtime.worker`, in the environment that torchrun gives.

    RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT   as torchrun sets them (LOCAL_RANK picks the GPU)
    MNEMOC_CONTROL    ZeroMQ address of the engine        MNEMOC_TOKEN     its secret, names the worker
    MNEMOC_ARTIFACT   the plan's folder                   MNEMOC_WEIGHTS   the model's directory
    MNEMOC_THREADS    torch threads on a CPU (default 1)

Control comes by ZeroMQ (small deltas), data flows by torch.distributed. The loop waits on the
control socket, brings the replicated state up to date, runs its role's `step`, and, in the last
stage, samples. It never spins.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq

from .. import artifact
from ..errors import MnemocError, RuntimeFault
from . import cores
from .batch import Batches, Wanted
from .comm import connect
from .growth import Growth
from .loader import ArtifactModules
from .protocol import Done, Failed, Ready, Reply, Step, decode_step, encode_reply
from .sampling import sample
from .sequences import Sequences
from .weights import Checkpoint, load_weights


@dataclass(frozen=True)
class Settings:
    """A worker's environment."""

    rank: int
    local_rank: int
    world: int
    control: str
    token: str
    artifact: Path
    weights: Path
    threads: int

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        try:
            return cls(
                int(env["RANK"]),
                int(env.get("LOCAL_RANK", env["RANK"])),
                int(env["WORLD_SIZE"]),
                env["MNEMOC_CONTROL"],
                env["MNEMOC_TOKEN"],
                Path(env["MNEMOC_ARTIFACT"]),
                Path(env["MNEMOC_WEIGHTS"]),
                int(env.get("MNEMOC_THREADS", "1")),
            )
        except KeyError as error:
            raise RuntimeFault(
                f"the environment variable {error.args[0]} is not set",
                do="start workers through `mnemoc run`, `mnemoc serve` or the plan's launch files",
            ) from error


class Worker:
    """A rank's modules, weights, KV cache and replicated state. `execute` runs one step."""

    def __init__(self, settings: Settings) -> None:
        manifest, contents = artifact.load(settings.artifact)
        plan, layout = manifest.plan, manifest.plan.layout
        if settings.world != layout.gpus:
            raise RuntimeFault(
                f"{settings.world} workers run, the plan ({layout}) is for {plan.gpus}"
            )
        stage, self.group, tp_rank = layout.coordinates(settings.rank)
        self.answers = stage == layout.spp - 1 and tp_rank == 0
        self.last_stage = stage == layout.spp - 1
        self.device = _device(plan.target, settings)
        if self.device.type == "cpu":
            cores.settle(settings.local_rank, settings.world, settings.threads)
        role = plan.stages[stage].role
        wanted = ("kernels/", f"schedule/{role}.py", "schedule/__init__", "schedule/collectives")
        program = ArtifactModules(settings.artifact, contents, wanted).load(f"schedule.{role}")
        self.step = program.step
        self.weights = load_weights(
            Checkpoint.open(settings.weights),
            program.PARAMETERS,
            program.FIRST_LAYER,
            program.NUM_LAYERS,
            {axis: layout.along(axis, settings.rank) for axis in ("tp", "tp_kvp")},
            self.device,
        )
        self.kv = [_caches(program, self.device) for _ in range(program.NUM_LAYERS)]
        growth = Growth.of(plan)
        self.sequences = Sequences(growth, self.group, plan.num_pages, plan.page_size, self.device)
        peers = [layout.rank(stage, group, tp_rank) for group in range(layout.kvp)]
        self.batches = Batches(growth, plan.page_size, peers, self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        with cores.giving_way():
            self.comm = connect(layout, settings.rank, backend)
        self.max_sends = layout.spp + 1
        self._sends: deque[Any] = deque()

    def execute(self, step: Step) -> Done | None:
        """Run the group's part of a step; what the engine is to hear, if it is this rank that tells."""
        started = time.perf_counter()
        decodes, chunks = self.sequences.apply(step)
        if not decodes and not chunks:
            return None
        batch, wanted = self.batches.build(decodes, chunks)
        result = self.step(self.weights, self.kv, batch, self.comm)
        if not self.last_stage:
            self._sends.append(result)
            if len(self._sends) > self.max_sends:
                self._sends.popleft().wait()
            return None
        if not self.answers:
            return None
        tokens, logits = self._results(result, wanted)
        return Done(step.number, self.group, tokens, logits, time.perf_counter() - started)

    def _results(
        self, logits_RV: torch.Tensor, wanted: list[Wanted]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, bytes]]]:
        tokens, sent = [], []
        for want in wanted:
            rows = logits_RV[want.first : want.first + want.count]
            if want.sample:
                position = want.sequence.length
                tokens.append(
                    (want.sequence.id, sample(rows[-1], want.sequence.sampling, position))
                )
            if want.send:
                data = rows[: want.send].to("cpu", torch.float32).contiguous().numpy().tobytes()
                sent.append((want.sequence.id, data))
        return tokens, sent


def main() -> int:
    """Connect to the engine, load, then serve steps until killed; returns the exit code."""
    try:
        settings = Settings.read(os.environ)
    except MnemocError as error:
        print(f"mnemoc: {error}", file=sys.stderr)
        return error.exit_code
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.identity = f"{settings.token}-{settings.rank}".encode()
    socket.sndhwm = socket.rcvhwm = 0
    socket.linger = 2000
    socket.connect(settings.control)

    def tell(reply: Reply) -> None:
        socket.send_multipart(encode_reply(reply))

    code = 0
    try:
        with torch.inference_mode():
            torch.set_num_threads(settings.threads)
            worker = Worker(settings)
            tell(Ready(settings.rank))
            while True:
                done = worker.execute(decode_step(socket.recv_multipart()))
                if done is not None:
                    tell(done)
    except MnemocError as error:
        code = error.exit_code
        tell(Failed(settings.rank, str(error), code))
    except Exception as error:
        code = RuntimeFault.exit_code
        sentence = f"worker {settings.rank} failed: {type(error).__name__}: {error}".splitlines()[0]
        tell(Failed(settings.rank, sentence, code, traceback.format_exc()))
    finally:
        context.destroy(linger=2000)
    return code


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


def _caches(program: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V pages of a layer. On a CPU the memory is only taken as it is written."""
    make = torch.empty if device.type == "cpu" else torch.zeros
    dtype = getattr(torch, program.KV_DTYPE)
    key, value = (make(program.KV_SHAPE, dtype=dtype, device=device) for _ in range(2))
    return key, value


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
