"""How a worker from outside joins its engine, and why it never outlives the set that it joined.

`guard`, a process of its own, says who it is until all ranks are there, and holds the connection from then
on. When that ends this process leaves, whatever its main thread is stuck in; or is killed, if it is stopped.
Its agent starts it again, and it says anew who it is.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import subprocess
import sys
import threading
from collections.abc import MutableMapping
from typing import IO, NoReturn, cast

import psutil

from ...errors import BadInput, RuntimeFault
from ..protocol import control
from ..protocol.messages import Hello, Refused
from ..protocol.wire import decode_answer, encode_hello
from .settings import Settings

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def join(settings: Settings) -> Settings:
    """Wait for the engine and for all other ranks; the settings, with the token of their set.

    Raises BadInput with what the engine says if it refuses this worker.
    """
    secret = control.read_secret(os.environ)
    hello = Hello(
        settings.rank, settings.world, control.digest_of(settings.artifact), socket.gethostname()
    )
    (who,) = encode_hello(hello)
    guard = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.guard", settings.control, who],
        stdin=subprocess.PIPE,  # its other end is held here, and nowhere else
        stdout=subprocess.PIPE,
    )
    line = cast(IO[bytes], guard.stdout).readline()
    if not line:
        raise RuntimeFault(f"worker {settings.rank}: the process that holds its leash has ended")
    answer = decode_answer([line])
    if isinstance(answer, Refused):
        raise BadInput(answer.sentence)
    threading.Thread(target=_obey, args=(guard,), name="mnemoc-leash", daemon=True).start()
    return dataclasses.replace(settings, token=answer.token, secret=secret)


def _obey(guard: subprocess.Popen[bytes]) -> NoReturn:
    """Leave when the guard holds nothing any more, or is gone."""
    cast(IO[bytes], guard.stdout).read()
    os._exit(RuntimeFault.exit_code)


def choose_interface(environment: MutableMapping[str, str]) -> None:
    """On one of several hosts, have gloo and NCCL use the interface that leads to MASTER_ADDR.

    Left alone gloo takes what the host's name resolves to, on many systems 127.0.1.1. A choice made stays.
    """
    alone = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
    if alone or GLOO in environment:
        return
    master = environment["MASTER_ADDR"]
    family = socket.getaddrinfo(master, None)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # nothing is sent: it only chooses a route
        address = probe.getsockname()[0]
    found = [
        name
        for name, theirs in psutil.net_if_addrs().items()
        if any(it.address == address for it in theirs)
    ]
    if not found or ipaddress.ip_address(address).is_loopback:
        raise RuntimeFault(
            f"no interface leads to the other hosts: towards {master} this host is {address}",
            do=f"start torchrun with --local-addr, or set {GLOO} and {NCCL}",
        )
    environment[GLOO] = found[0]
    environment.setdefault(NCCL, f"={found[0]}")
