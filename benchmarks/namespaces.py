"""Hosts for want of hosts: network namespaces of this machine, each with its own address, on one bridge.

They share disks and processors and nothing of the network; a link between two of them can be cut and healed.
Linux, `ip` and the right to use them are needed (`possible` tells).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Host:
    """A namespace. cable: our end of its link; address: by which all of them, and we, reach it"""

    name: str
    cable: str
    address: str
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, command: list[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """A process there. What it prints is added to the log."""
        with log.open("ab") as sink:
            started = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env=dict(environment),
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(started)
        return started

    def cut(self) -> None:
        """As if somebody pulled the cable: what runs there goes on, and hears nothing."""
        _ip("link", "set", self.cable, "down")

    def heal(self) -> None:
        _ip("link", "set", self.cable, "up")

    def processes(self) -> list[int]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self) -> None:
        """Everything that runs there."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for started in self._started:
            started.wait()


def possible() -> bool:
    """Whether namespaces can be made here."""
    probe = f"mn{os.getpid()}p"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
        return True
    return False


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` of them; whatever runs in them is killed at the end, and nothing is left."""
    bridge, net = f"mn{os.getpid()}", f"10.213.{os.getpid() % 250}"
    made = [Host(f"{bridge}h{i}", f"{bridge}c{i}", f"{net}.{i + 1}") for i in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in made:
            _ip("netns", "add", host.name)
            _ip("link", "add", host.cable, "type", "veth", "peer", "eth0", "netns", host.name)
            _ip("link", "set", host.cable, "master", bridge, "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.kill()
                _ip("netns", "del", host.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
