"""The distributed executor: the engine's side of the workers. No torch.

Has them started (`launcher`), sends steps, collects what comes back, and notices within moments when
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

from ...errors import BadInput, MnemocError, RuntimeFault, UsageError
from ..protocol.messages import Done, Failed, Step
from ..protocol.pulse import beating
from ..protocol.wire import decode_reply, encode_step
from .launcher import Complete, Launcher, Lost
from .suspects import Violence
from .vigil import LOOK_S, Vigil

JOIN_S = 120.0
"""The time that a worker has until its first sign of life: its parent may first have to load torch."""
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
    """The process that forks workers of this machine. It may serve one engine after another."""

    threads: int = 1
    taken: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    _line: bytes = b""
    _token: str = ""  # of the set of workers that is meant to run; others do not concern us
    _ordered: str = ""  # the set that it has not said yet to have spawned
    _oom_kills: float = 0.0  # when that was ordered

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._line, self._ordered = b"", ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mnemoc.runtime.rank.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(self.threads),
            bufsize=0,
            process_group=0,  # Ctrl-C is the engine's to handle
        )

    @property
    def tended(self) -> bool:
        return False

    def listen(self, socket: zmq.Socket[bytes]) -> None:
        socket.bind(_local_address())

    def spawn(self, environment: Mapping[str, str], world: int) -> str:
        if self._ordered:  # it was told long ago: it hangs
            self.process.kill()
            self.process.wait()
        if self.process.poll() is not None:
            self.close()
            self.start()
        self._oom_kills = _oom_kills()
        self._token = self._ordered = secrets.token_hex(16)
        ordered = {**environment, "MNEMOC_TOKEN": self._token, "WORLD_SIZE": str(world)}
        self._order({"spawn": ordered, "ranks": list(range(world))})
        return self._token

    def introduced(self, sender: zmq.Frame, frames: list[bytes]) -> list[Complete | Lost]:
        return []  # a worker of an earlier set, or a stranger

    def kill(self) -> None:
        self._token = ""
        if self.process.poll() is None:
            with contextlib.suppress(BrokenPipeError):  # it is just dying, and they with it
                self._order({"kill": True})

    @property
    def waitable(self) -> int:
        return cast(IO[bytes], self.process.stdout).fileno()

    def hear(self) -> list[Complete | Lost]:
        data = os.read(self.waitable, 65536)
        if not data:
            self.process.wait()
            return [Lost(Violence("the parent process of the workers died"), certain=True)]
        *lines, self._line = (self._line + data).split(b"\n")
        said = [json.loads(line) for line in lines]
        if {"spawned": self._ordered} in said:
            self._ordered = ""
        deaths = [it for it in said if it.get("token") == self._token]
        short_of_memory = _oom_kills() != self._oom_kills  # or nobody can tell
        return [_lost(it["died"], it["code"], short_of_memory) for it in deaths]

    def close(self) -> None:
        """End it and, with it, all of its workers."""
        for pipe in (self.process.stdin, self.process.stdout):
            cast(IO[bytes], pipe).close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _order(self, message: Mapping[str, Any]) -> None:
        cast(IO[bytes], self.process.stdin).write(json.dumps(message).encode() + b"\n")


def _lost(rank: int, code: int, short_of_memory: bool) -> Lost:
    """code: its exit code, or minus the signal that ended it (SIGKILL: by somebody, or for want of memory)"""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    by_somebody = code == -signal.SIGKILL and not short_of_memory
    kind = Violence if by_somebody else RuntimeFault
    return Lost(kind(f"worker {rank} died ({how})"), certain=code < 0)


def _oom_kills() -> float:
    """Processes that this machine's kernel has ended for want of memory, whosever they were; NaN: unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return float(line.split()[1])
    return math.nan


class Workers:
    """`world` workers for one artifact and its weights."""

    def __init__(
        self, artifact: Path, weights: Path, world: int, launcher: Launcher | None
    ) -> None:
        if launcher is not None and launcher.taken:
            raise UsageError(
                "another engine has its workers from there: ours would end them",
                where="nursery",
                do="close that engine first, or give each a process of its own",
            )
        self.world = world
        self.up = False
        self._own_launcher = launcher is None
        self.threads = int(os.environ.get("MNEMOC_THREADS", "1"))
        self._launcher = launcher or NurseryProcess(self.threads)
        self._launcher.taken = True
        self._context = zmq.Context()
        self._env = {
            "MNEMOC_ARTIFACT": str(artifact.absolute()),
            "MNEMOC_WEIGHTS": str(weights.absolute()),
            "MNEMOC_THREADS": str(self.threads),
        }
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._socket: zmq.Socket[bytes] | None = None
        self._names: dict[bytes, int] = {}
        self._pulses: dict[bytes, int] = {}
        self._ready: set[int] = set()
        self._vigil = Vigil()
        self._suspect: tuple[float, MnemocError] | None = None

    @property
    def tended(self) -> bool:
        """As of `Launcher`."""
        return self._launcher.tended

    def spawn(self) -> None:
        """Have a fresh set of workers started, and those that run ended. `poll` reports Up or Down."""
        self.kill()
        if self._socket is not None:
            self._poller.unregister(self._socket)
            self._poller.unregister(self._launcher.waitable)
            self._socket.close(0)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.linger = 0
        self._launcher.listen(self._socket)
        control = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        token = self._launcher.spawn({**self._env, "MNEMOC_CONTROL": control}, self.world)
        if token is not None:
            self._begin(token)
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._launcher.waitable, zmq.POLLIN)

    def _begin(self, token: str) -> None:
        """From now on hear the workers of this set."""
        names = {f"{token}-{rank}": rank for rank in range(self.world)}
        self._names = {name.encode(): rank for name, rank in names.items()}
        self._pulses = {beating(name): rank for name, rank in names.items()}
        self._vigil.begin(range(self.world), JOIN_S)

    def kill(self) -> None:
        """End all workers."""
        self.up = False
        self._names, self._pulses, self._suspect = {}, {}, None
        self._ready.clear()
        self._vigil.end()
        self._launcher.kill()

    def send(self, step: Step) -> None:
        """The step, to every worker."""
        assert self._socket is not None, "spawn comes first"
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
        if self._socket is not None and self._socket in readable:
            self._hear_workers(self._socket, events)
        if self._launcher.waitable in readable:
            self._note(self._launcher.hear())
        if (silent := self._vigil.silent(self._ready)) is not None:
            rank, silent_s = silent
            sign = f"worker {rank} has given no sign of life for {silent_s:.0f} s"
            self._suspicion(Violence(sign), certain=True)
        if self._suspect is not None and time.monotonic() >= self._suspect[0]:
            events.append(Down(self._suspect[1]))
            self.kill()
        return events

    def close(self) -> None:
        self.kill()
        self._launcher.taken = False
        if self._own_launcher:
            self._launcher.close()
        self._context.destroy(linger=0)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _hear_workers(self, socket: zmq.Socket[bytes], events: list[Done | Up | Down]) -> None:
        while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            sender = socket.recv(copy=False)
            frames = socket.recv_multipart()
            name = sender.bytes
            if name in self._pulses:
                self._vigil.heard(self._pulses[name])
                continue
            if name not in self._names:
                self._note(self._launcher.introduced(sender, frames))
                continue
            self._vigil.heard(
                self._names[name]
            )  # else who was silent while it loaded is lost once ready
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

    def _note(self, heard: list[Complete | Lost]) -> None:
        for event in heard:
            if isinstance(event, Complete):
                self._begin(event.token)
            else:
                self._suspicion(event.error, event.certain)

    def _failed(self, reply: Failed) -> None:
        if reply.exit_code == BadInput.exit_code:
            self._suspicion(BadInput(reply.sentence), certain=True)
            return
        fault = RuntimeFault(reply.sentence)
        fault.add_note(reply.trace)
        self._suspicion(fault, certain=False)

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
