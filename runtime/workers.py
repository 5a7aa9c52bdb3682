"""The distributed executor: the engine's side of the workers. No torch.

Starts them through a nursery, sends steps, collects what comes back, and notices within moments when
one is gone, within seconds when one falls silent. `poll` is the only place where the engine waits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import zmq

from ..errors import BadInput, MnemocError, RuntimeFault
from .protocol import Done, Failed, Step
from .pulse import beating
from .vigil import LOOK_S, Vigil
from .wire import decode_reply, encode_step

GRACE_S = 0.3
"""After the first sign of a fault, wait this long for the sign that names its cause."""


@dataclass(frozen=True)
class Up:
    """All workers are ready for steps."""


@dataclass(frozen=True)
class Down:
    """The workers are no longer usable."""

    error: MnemocError


def worker_environment(threads: int = 1) -> dict[str, str]:
    """This process's environment, as workers on a CPU are to have it."""
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(threads)
    env["OPENBLAS_NUM_THREADS"] = "1"  # a fork must find one thread
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # torch: KV on huge pages streams up to twice as fast
    return env


@dataclass
class NurseryProcess:
    """The process that forks workers. It may serve one engine after another.

    join_s: the time that a worker has from `spawn` until its first sign of life
    """

    threads: int = 1
    join_s: float = 60.0
    process: subprocess.Popen[bytes] = field(init=False)
    _line: bytes = b""

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._line = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mnemoc.runtime.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(self.threads),
            bufsize=0,
            process_group=0,  # Ctrl-C is the engine's to handle
        )

    def order(self, message: Mapping[str, Any]) -> None:
        cast(IO[bytes], self.process.stdin).write(json.dumps(message).encode() + b"\n")

    def fileno(self) -> int:
        return cast(IO[bytes], self.process.stdout).fileno()

    def hear(self) -> list[dict[str, Any]] | None:
        """Its messages (call it when `fileno` is readable); None once it is gone."""
        data = os.read(self.fileno(), 65536)
        if not data:
            return None
        *lines, self._line = (self._line + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End it and, with it, all of its workers."""
        for pipe in (self.process.stdin, self.process.stdout):
            cast(IO[bytes], pipe).close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Workers:
    """`world` workers for one artifact and its weights."""

    def __init__(
        self, artifact: Path, weights: Path, world: int, nursery: NurseryProcess | None
    ) -> None:
        self.world = world
        self.up = False
        self._own_nursery = nursery is None
        self.threads = int(os.environ.get("MNEMOC_THREADS", "1"))
        self._nursery = nursery or NurseryProcess(self.threads)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.linger = 0
        self._socket.bind(_local_address())
        self._env = {
            "MNEMOC_CONTROL": self._socket.getsockopt_string(zmq.LAST_ENDPOINT),
            "MNEMOC_ARTIFACT": str(artifact.absolute()),
            "MNEMOC_WEIGHTS": str(weights.absolute()),
            "MNEMOC_THREADS": str(self.threads),
            "WORLD_SIZE": str(world),
        }
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._poller.register(self._nursery.fileno(), zmq.POLLIN)
        self._names: dict[bytes, int] = {}
        self._pulses: dict[bytes, int] = {}
        self._ready: set[int] = set()
        self._vigil = Vigil()
        self._suspect: tuple[float, MnemocError] | None = None
        self._token = ""  # of the set of workers that is meant to run; others do not concern us

    def spawn(self) -> None:
        """Start a fresh set of workers, after ending those that run. `poll` reports Up or Down."""
        self.kill()
        if self._nursery.process.poll() is not None:
            self._poller.unregister(self._nursery.fileno())
            self._nursery.close()
            self._nursery.start()
            self._poller.register(self._nursery.fileno(), zmq.POLLIN)
        self._token = secrets.token_hex(16)
        names = {f"{self._token}-{rank}": rank for rank in range(self.world)}
        self._names = {name.encode(): rank for name, rank in names.items()}
        self._pulses = {beating(name): rank for name, rank in names.items()}
        self._vigil.begin(range(self.world), self._nursery.join_s)
        spawn = {**self._env, "MNEMOC_TOKEN": self._token}
        self._nursery.order({"spawn": spawn, "ranks": list(range(self.world))})

    def kill(self) -> None:
        """End all workers."""
        self.up = False
        self._token, self._names, self._pulses, self._suspect = "", {}, {}, None
        self._ready.clear()
        self._vigil.end()
        if self._nursery.process.poll() is None:
            with contextlib.suppress(BrokenPipeError):  # it is just dying, and they with it
                self._nursery.order({"kill": True})

    def send(self, step: Step) -> None:
        """The step, to every worker."""
        frames = encode_step(step)
        for name in self._names:
            self._socket.send_multipart([name, *frames])

    def condemn(self, error: MnemocError) -> None:
        """They are of no use any more, for a reason that is not seen from here: `poll` says Down."""
        self._suspicion(error, certain=True)

    def wake(self) -> None:
        """From any thread: let `poll` return."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_write, b"\0")

    def poll(self, timeout_s: float | None) -> list[Done | Up | Down]:
        """What happened, waiting up to `timeout_s` seconds (None: a moment, or until something does)."""
        timeout_s = LOOK_S if timeout_s is None else min(timeout_s, LOOK_S)
        if self._suspect is not None:
            timeout_s = min(timeout_s, max(0.0, self._suspect[0] - time.monotonic()))
        readable = dict(self._poller.poll(math.ceil(timeout_s * 1000)))
        events: list[Done | Up | Down] = []
        if self._wake_read in readable:
            os.read(self._wake_read, 4096)
        if self._socket in readable:
            self._hear_workers(events)
        if self._nursery.fileno() in readable:
            self._hear_nursery()
        if (silent := self._vigil.silent(self._ready)) is not None:
            rank, silent_s = silent
            sign = f"worker {rank} has given no sign of life for {silent_s:.0f} s"
            self._suspicion(RuntimeFault(sign), certain=True)
        if self._suspect is not None and time.monotonic() >= self._suspect[0]:
            events.append(Down(self._suspect[1]))
            self.kill()
        return events

    def close(self) -> None:
        if self._own_nursery:
            self._nursery.close()
        else:
            self.kill()
        self._context.destroy(linger=0)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _hear_workers(self, events: list[Done | Up | Down]) -> None:
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            name, *frames = self._socket.recv_multipart()
            if name in self._pulses:
                self._vigil.heard(self._pulses[name])
                continue
            if name not in self._names:
                continue  # a worker of an earlier set, or a stranger
            reply = decode_reply(frames)
            if isinstance(reply, Done):
                events.append(reply)
            elif isinstance(reply, Failed):
                self._failed(reply)
            else:
                self._ready.add(reply.rank)
                if len(self._ready) == self.world:
                    self.up = True
                    events.append(Up())

    def _failed(self, reply: Failed) -> None:
        if reply.exit_code == BadInput.exit_code:
            self._suspicion(BadInput(reply.sentence), certain=True)
            return
        fault = RuntimeFault(reply.sentence)
        fault.add_note(reply.trace)
        self._suspicion(fault, certain=False)

    def _hear_nursery(self) -> None:
        messages = self._nursery.hear()
        if messages is None:
            self._nursery.process.wait()
            self._suspicion(RuntimeFault("the parent process of the workers died"), certain=True)
            return
        for message in messages:
            if message["token"] == self._token:
                self._died(message["died"], message["code"])

    def _died(self, rank: int, code: int) -> None:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._suspicion(RuntimeFault(f"worker {rank} died ({how})"), certain=code < 0)

    def _suspicion(self, error: MnemocError, certain: bool) -> None:
        """Note a fault. A certain cause replaces a mere symptom and needs no more waiting."""
        if certain:
            self._suspect = (time.monotonic(), error)
        elif self._suspect is None:
            self._suspect = (time.monotonic() + GRACE_S, error)


def _local_address() -> str:
    """Where the engine listens: on Linux a local socket without a file (half of TCP's delay)."""
    if sys.platform == "linux":
        return f"ipc://@mnemoc-{secrets.token_hex(8)}"
    return "tcp://127.0.0.1:*"
