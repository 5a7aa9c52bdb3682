"""Workers that others start, on any number of hosts: the engine waits for them on a TCP address. No torch.

Under `torchrun` each host's agent starts its workers and, when one of them ends, all agents together
start all of them again. So nothing here starts or ends a process:

    spawn   wait until one worker of every rank has introduced itself, with the very plan that is served
    kill    hang up, when the next set is spawned: a worker whose leash ends leaves, stopped or not (see
            `rank.guard`), with an exit code that makes its agent start it again

Connections are encrypted and proven by a secret that all hosts have (`control`). A worker's guard introduces
it over one that carries nothing else afterwards but ZeroMQ's heartbeats: the end of a process is seen
at once, and that of a host or its link after `control.HEARTBEAT_TIMEOUT_S`, at both ends.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from ...errors import BadInput, RuntimeFault, UsageError
from ..protocol import control
from ..protocol.messages import Hello, Refused, Welcome
from ..protocol.wire import decode_hello, encode_answer
from .launcher import Complete, Lost

BIND_S = 5.0
"""How long an address may stay taken by the socket that was just closed."""


def at(address: str, directory: Path, environment: Mapping[str, str]) -> Outside:
    """For the plan in `directory`; the environment says which secret (see `control.read_secret`)."""
    return Outside(address, control.digest_of(directory), control.read_secret(environment))


@dataclass(frozen=True)
class Peer:
    """A worker that has introduced itself. connection: its leash's descriptor in ZeroMQ"""

    name: bytes
    connection: int
    host: str


@dataclass
class Outside:
    """address: tcp://HOST:PORT to listen on; digest: of the plan; secret: what workers prove to have"""

    address: str
    digest: str
    secret: bytes = field(repr=False)
    taken: bool = False
    _world: int = 0
    _peers: dict[int, Peer] = field(default_factory=dict)
    _complete: bool = False
    _socket: zmq.Socket[bytes] | None = None
    _monitor: zmq.Socket[bytes] | None = None

    def __post_init__(self) -> None:
        if not self.address.startswith("tcp://") or ":" not in self.address[6:]:
            raise UsageError(
                "not an address to wait for workers on",
                where="--control",
                got=self.address,
                do="write tcp://HOST:PORT, as tcp://0.0.0.0:29600",
            )

    @property
    def tended(self) -> bool:
        return True

    def listen(self, socket: zmq.Socket[bytes]) -> None:
        control.answer(socket, self.secret)
        if self._monitor is not None:
            self._monitor.close(0)
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        deadline_s = time.monotonic() + BIND_S
        while True:
            try:
                socket.bind(self.address)
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline_s:
                    raise BadInput(
                        f"cannot listen: {error.strerror.lower()}",
                        where=self.address,
                        do="choose another --control",
                    ) from error
                time.sleep(0.01)

    def spawn(self, environment: Mapping[str, str], world: int) -> None:
        self._world, self._complete = world, False
        self._peers.clear()

    def kill(self) -> None:
        """Nothing: connections end when the engine closes their socket, and workers with them."""

    @property
    def waitable(self) -> zmq.Socket[bytes]:
        assert self._monitor is not None, "listen comes first"
        return self._monitor

    def introduced(self, sender: zmq.Frame, frames: list[bytes]) -> list[Complete | Lost]:
        heard = (
            self.hear()
        )  # else a connection that ended might be taken for a new one of its number
        hello = decode_hello(frames)
        if hello is None:
            return heard
        peer = Peer(sender.bytes, int(sender.get(zmq.SRCFD)), hello.host)
        if sentence := self._refusal(hello):
            self._answer(peer, Refused(sentence))
            return heard if self._complete else [*heard, Lost(BadInput(sentence), certain=True)]
        before = self._peers.get(hello.rank)
        if self._complete:
            if before is None or before.name == peer.name:
                return heard
            said = f"worker {hello.rank} was started again, on {peer.host}"
            return [*heard, Lost(RuntimeFault(said), certain=True)]
        self._peers[hello.rank] = peer
        return heard + self._gathered()

    def hear(self) -> list[Complete | Lost]:
        lost: list[Complete | Lost] = []
        while self.waitable.poll(0):
            connection = int(recv_monitor_message(self.waitable)["value"])
            for rank, peer in list(self._peers.items()):
                if peer.connection == connection:
                    del self._peers[rank]
                    error = RuntimeFault(f"worker {rank} on {peer.host} is gone: no connection")
                    lost += [Lost(error, certain=False)] if self._complete else []
        return lost

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close(0)

    def _refusal(self, hello: Hello) -> str | None:
        """Why this worker can never be one of ours."""
        who = f"worker {hello.rank} on {hello.host}"
        if hello.digest != self.digest:
            return (
                f"{who} has another plan (its manifest.json has sha256 {hello.digest[:12]}…, here it has "
                f"{self.digest[:12]}…); copy the plan's folder to every host"
            )
        if hello.world != self._world or not 0 <= hello.rank < self._world:
            return (
                f"{who} is one of {hello.world} workers, the plan is for {self._world}; all hosts' "
                f"--nproc-per-node must add up to that"
            )
        return None

    def _gathered(self) -> list[Complete | Lost]:
        """All ranks are there: they get a name for what they are together, and begin to load."""
        if len(self._peers) < self._world:
            return []
        self._complete = True
        token = secrets.token_hex(16)
        for peer in self._peers.values():
            self._answer(peer, Welcome(token))
        return [Complete(token)]

    def _answer(self, peer: Peer, answer: Welcome | Refused) -> None:
        assert self._socket is not None, "listen comes first"
        self._socket.send_multipart([peer.name, *encode_answer(answer)])
