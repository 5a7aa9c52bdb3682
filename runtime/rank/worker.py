"""One rank: `python -m mnemoc.runtime.rank.worker`, in the environment that torchrun gives.

    RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT   as torchrun sets them (LOCAL_RANK picks the GPU)
    MNEMOC_CONTROL    ZeroMQ address of the engine        MNEMOC_TOKEN     names the set of workers
    MNEMOC_ARTIFACT   the plan's folder                   MNEMOC_WEIGHTS   the model's directory
    MNEMOC_THREADS    torch threads on a CPU (default 1)

Without MNEMOC_TOKEN it was started from outside, by torchrun or by hand, and joins the engine first
(`leash`); then MNEMOC_SECRET, or the file MNEMOC_SECRET_FILE, is what all hosts share.

Control comes by ZeroMQ (small deltas), data flows by torch.distributed. The loop waits on the control
socket and hands what comes to the rank's `Stage`. It never spins.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
import zmq

from ...errors import BadInput, MnemocError, RuntimeFault
from ..protocol.control import dial
from ..protocol.messages import Failed, Ready, Reply, Step
from ..protocol.pulse import Pulse
from ..protocol.wire import decode_step, encode_reply
from . import leash
from .orphans import die_with_parent
from .settings import Settings
from .stage import Launched, Prepared, Stage

PREPARED = 2
"""Micro-batches prepared at most: the one to compute, and one whose rows arrive meanwhile."""


def main() -> int:
    """Connect to the engine, load, then serve steps until killed; returns the exit code."""
    try:
        settings = Settings.read(os.environ)
        if settings.token is None:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                die_with_parent(os.getppid())  # an agent that is killed leaves no workers behind
            leash.choose_interface(os.environ)
            settings = leash.join(settings)
    except MnemocError as error:
        print(f"mnemoc: {error}", file=sys.stderr)
        return error.exit_code
    context = zmq.Context()
    name = f"{settings.token}-{settings.rank}"
    socket = dial(context, settings.control, name, settings.secret)
    socket.linger = 2000

    def tell(reply: Reply) -> None:
        socket.send_multipart(encode_reply(reply))

    code = 0
    try:
        with torch.inference_mode(), Pulse(context, settings.control, name, settings.secret):
            torch.set_num_threads(settings.threads)
            stage = load(settings)
            tell(Ready(settings.rank))
            serve(
                stage,
                lambda: bool(socket.poll(0)),
                lambda: decode_step(socket.recv_multipart()),
                tell,
            )
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


def load(settings: Settings) -> Stage:
    """The rank's stage. Raises BadInput where there is no room for it: it will be so each time."""
    try:
        return Stage(settings)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BadInput(
            "no room for its weights and KV pages",
            where=f"worker {settings.rank}",
            got=str(error).partition("\n")[0],
            do="see what else holds memory there, or plan for a shorter --context",
        ) from error


def serve(
    stage: Stage,
    waiting: Callable[[], bool],
    receive: Callable[[], Step],
    tell: Callable[[Reply], None],
) -> NoReturn:
    """Steps in the order in which they come, each prepared before the one before it is computed.

    waiting: whether a step is here; receive: the next one, once it is
    """
    prepared: deque[Prepared] = deque()
    launched: deque[Launched] = deque()
    while True:
        if len(launched) == stage.ahead:
            tell(stage.finish(launched.popleft()))
        while len(prepared) < PREPARED and (waiting() or not (prepared or launched)):
            ours = stage.prepare(receive())
            prepared += [] if ours is None else [ours]
        if prepared:
            answer = stage.launch(prepared.popleft())
            launched += [] if answer is None else [answer]
        else:
            tell(stage.finish(launched.popleft()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
