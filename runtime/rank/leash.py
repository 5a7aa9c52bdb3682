"""How a worker from outside joins its engine, and why it never outlives the set that it joined.

It says who it is until all ranks are there. Then only heartbeats pass; and when they cease, because the
engine is gone, or cut off, or has hung up to begin again, this process ends, whatever its main thread is
stuck in. Its agent starts it again, and it says anew who it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import queue
import secrets
import socket
import sys
import threading
from collections.abc import MutableMapping

import psutil
import zmq

from ...errors import BadInput, RuntimeFault
from ..protocol import control
from ..protocol.messages import Hello, Refused, Welcome
from ..protocol.wire import decode_answer, encode_hello
from .settings import Settings

INTRODUCTION_S = 1.0
"""A worker repeats who it is after so long: the engine may have begun again meanwhile."""
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def join(context: zmq.Context[zmq.Socket[bytes]], settings: Settings) -> Settings:
    """Wait for the engine and for all other ranks; the settings, with the token of their set.

    Raises BadInput with what the engine says if it refuses this worker.
    """
    secret = control.read_secret(os.environ)
    heard: queue.SimpleQueue[Welcome | Refused] = queue.SimpleQueue()
    hello = Hello(
        settings.rank, settings.world, control.digest_of(settings.artifact), socket.gethostname()
    )
    name = f"leash-{secrets.token_hex(16)}"
    line = control.dial(context, settings.control, name, secret, unsent=1)
    thread = threading.Thread(
        target=_hold, args=(line, hello, heard), name="mnemoc-leash", daemon=True
    )
    thread.start()
    answer = heard.get()
    if isinstance(answer, Refused):
        thread.join()
        raise BadInput(answer.sentence)
    return dataclasses.replace(settings, token=answer.token, secret=secret)


def _hold(
    line: zmq.Socket[bytes], hello: Hello, heard: queue.SimpleQueue[Welcome | Refused]
) -> None:
    with line, line.get_monitor_socket(zmq.EVENT_DISCONNECTED) as ends:
        line.linger = 0
        while not line.poll(0):
            while ends.poll(0):  # until all are there, the engine may come and go
                ends.recv_multipart()
            with contextlib.suppress(zmq.Again):
                line.send_multipart(encode_hello(hello), zmq.NOBLOCK)
            line.poll(round(INTRODUCTION_S * 1000))
        answer = decode_answer(line.recv_multipart())
        heard.put(answer)
        if isinstance(answer, Refused):
            return
        try:
            ends.poll()
        except zmq.ZMQError:  # the main thread has ended, and with it the context
            return
    print(f"mnemoc: worker {hello.rank} has lost its engine, and leaves", file=sys.stderr)
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
