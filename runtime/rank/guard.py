"""Holds a worker's leash, in a process of its own that `leash.join` starts.

It tells the engine who the worker is until all ranks are there, and the worker what the engine answers. Then
only heartbeats pass; and when they cease, because the engine is gone, or cut off, or has hung up to begin
again, the worker is told to leave, and killed if it does not. A worker that is stopped (SIGSTOP) could not
see to that itself: it would keep its device, and wake one day beside those that took its place.

    python -m mnemoc.runtime.rank.guard ADDRESS HELLO      where the engine is, and what it is told

    stdin    nothing; its end is that of the worker
    stdout   a line, the engine's answer; its end tells the worker to leave

Its environment holds the secret. No torch.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import NoReturn

import zmq

from ..protocol import control
from ..protocol.messages import Hello, Refused
from ..protocol.wire import decode_answer, decode_hello, encode_hello

INTRODUCTION_S = 1.0
"""A worker's name is repeated after so long: the engine may have begun again meanwhile."""
LAST_S = 1.0
"""A worker that was told to leave has so long."""
ASKED = (signal.SIGTERM, signal.SIGINT)
"""These go to all of the worker's group: it may be that the worker cannot obey."""
STDIN, STDOUT = 0, 1


def main() -> None:
    address, who = sys.argv[1:]
    hello = decode_hello([who.encode()])
    assert hello is not None, "whoever starts this says so"
    worker = os.getppid()
    for number in ASKED:
        signal.signal(number, lambda *_: end(worker))
    if hold(address, control.read_secret(os.environ), hello):
        print(f"mnemoc: worker {hello.rank} has lost its engine, and leaves", file=sys.stderr)
        end(worker)


def hold(address: str, secret: bytes, hello: Hello) -> bool:
    """Until the worker has lost its engine; or false: it was refused, or is gone itself."""
    context = zmq.Context()
    line = control.dial(context, address, f"leash-{os.urandom(16).hex()}", secret, unsent=1)
    ends = line.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    poller = zmq.Poller()
    poller.register(STDIN, zmq.POLLIN)
    poller.register(line, zmq.POLLIN)
    readable: dict[object, int] = {}
    while not readable:
        while ends.poll(0):  # until all are there, the engine may come and go
            ends.recv_multipart()
        with contextlib.suppress(zmq.Again):
            line.send_multipart(encode_hello(hello), zmq.NOBLOCK)
        readable = dict(poller.poll(round(INTRODUCTION_S * 1000)))
    if STDIN in readable:
        return False
    (answer,) = line.recv_multipart()
    os.write(STDOUT, answer + b"\n")
    if isinstance(decode_answer([answer]), Refused):
        return False
    poller.unregister(line)
    poller.register(ends, zmq.POLLIN)
    return ends in dict(poller.poll())


def end(worker: int) -> NoReturn:
    """Have the worker leave, and leave."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)
    os.close(STDOUT)
    gone, _, _ = select.select([STDIN], [], [], LAST_S)
    if not gone and os.getppid() == worker:
        print(f"mnemoc: process {worker} does not leave, and is killed", file=sys.stderr)
        os.kill(worker, signal.SIGKILL)
    os._exit(0)  # ZeroMQ has nothing left to say


if __name__ == "__main__":
    main()
    os._exit(0)
