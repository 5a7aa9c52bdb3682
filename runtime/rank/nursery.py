"""Starts the workers of this machine: imports torch once, then forks each worker from itself.

Eight workers that import torch each on their own take many seconds; forked ones start at once, and
a restart after a fault is as quick. It talks in lines of JSON on its pipes:

    in    {"spawn": {environment}, "ranks": [0, 1, ...]}      {"kill": true}
    out   {"spawned": MNEMOC_TOKEN of the environment}
          {"died": rank, "code": exit code or −signal, "token": as above}

Nobody outlives anybody: when the engine goes, this process reads the end of its input and kills the
workers; when this process goes, the kernel kills them (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
from typing import Any, NoReturn

from .orphans import die_with_parent


class Nursery:
    """The parent of all workers. One thread, no torch work of its own."""

    def __init__(self) -> None:
        self.children: dict[int, int] = {}  # pid → rank
        self.token = ""
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_write, False)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.input = b""

    def run(self) -> None:
        """Serve until the engine closes its end."""
        while True:
            readable, _, _ = select.select([0, self.wake_read], [], [])
            if self.wake_read in readable:
                os.read(self.wake_read, 4096)
                self.reap()
            if 0 in readable:
                data = os.read(0, 65536)
                if not data:
                    self.kill()
                    return
                *lines, self.input = (self.input + data).split(b"\n")
                for line in lines:
                    self.obey(json.loads(line))

    def obey(self, order: dict[str, Any]) -> None:
        if "spawn" in order:
            self.spawn(order["spawn"], order["ranks"])
        else:
            self.kill()

    def spawn(self, environment: dict[str, str], ranks: list[int]) -> None:
        """Fork the ranks. They meet at a listening socket made here, so no port is guessed."""
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            environment = {
                **environment,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting.getsockname()[1]),
                "MNEMOC_STORE_FD": str(meeting.fileno()),
            }
            self.token = environment["MNEMOC_TOKEN"]
            gc.freeze()
            for rank in ranks:
                parent = os.getpid()
                pid = os.fork()
                if pid == 0:
                    _become_worker(rank, environment, meeting, parent)
                self.children[pid] = rank
        self.say({"spawned": self.token})

    def reap(self) -> None:
        """Tell of those that ended."""
        for pid, rank in list(self.children.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.children[pid]
                code = os.waitstatus_to_exitcode(status)
                self.say({"died": rank, "code": code, "token": self.token})

    def kill(self) -> None:
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.children:
            os.waitpid(pid, 0)
        self.children.clear()

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(1, json.dumps(message).encode() + b"\n")


def _become_worker(
    rank: int, environment: dict[str, str], meeting: socket.socket, parent: int
) -> NoReturn:
    """In the child: die with the parent, leave its pipes alone, be a worker."""
    code = 1
    try:
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(2, 1)  # what a worker prints must not mix with the nursery's answers
        if rank == 0:
            os.set_inheritable(meeting.fileno(), True)
        else:
            meeting.close()
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        from .worker import main

        code = main()
    finally:
        os._exit(code)


def main() -> None:
    importlib.import_module(f"{__package__}.worker")  # and with it torch, once for all
    Nursery().run()
    os._exit(0)  # nothing is left to tidy, and an interpreter with torch in it takes long to do so


if __name__ == "__main__":
    main()
