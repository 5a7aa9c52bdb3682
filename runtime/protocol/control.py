"""Connections between engine and workers. No torch.

On one machine they are local and need nothing. Between hosts they carry heartbeats, so that an end which
vanishes is missed, and ZeroMQ's CURVE encrypts them, with keys made from a secret of all hosts. Both key
pairs follow from it. The engine's public key is never sent, and without it nobody can as much as begin to
talk: so whoever gets through has the secret, and so has the engine that answers.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

import zmq
from zmq.utils import z85

from ...errors import BadInput, RuntimeFault
from ...folder import read_manifest

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 5.0
VARIABLE = "MNEMOC_SECRET"
SHORTEST = 32
_DO = "`openssl rand -hex 32` makes one; give the same to the engine and to all workers"


def digest_of(directory: Path) -> str:
    """What hosts compare to know that they have the same plan: every file's hash is in the manifest."""
    return hashlib.sha256(read_manifest(directory)).hexdigest()


def read_secret(environment: Mapping[str, str]) -> bytes:
    """What MNEMOC_SECRET holds, or the file MNEMOC_SECRET_FILE; BadInput if there is neither."""
    path = environment.get(f"{VARIABLE}_FILE")
    if path is None and VARIABLE not in environment:
        raise BadInput(f"neither {VARIABLE} nor {VARIABLE}_FILE is set", do=_DO)
    try:
        text = environment[VARIABLE] if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("cannot read the secret", where=path, do=_DO) from error
    if len(text.strip()) < SHORTEST:
        where = path or VARIABLE
        raise BadInput(f"the secret has less than {SHORTEST} characters", where=where, do=_DO)
    return text.strip().encode()


def dial(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    name: str,
    secret: bytes | None,
    unsent: int = 0,
) -> zmq.Socket[bytes]:
    """A worker's end, on its way to the engine.

    secret: None on the engine's own machine; unsent: messages that may wait to be sent, 0 for any number
    """
    socket = context.socket(zmq.DEALER)
    socket.identity = name.encode()
    socket.sndhwm, socket.rcvhwm = unsent, 0
    if secret is not None:
        socket.curve_secretkey, socket.curve_publickey = _pair(secret, "worker")
        socket.curve_serverkey = _pair(secret, "engine")[1]
        _keep_alive(socket)
    socket.connect(address)
    return socket


def answer(socket: zmq.Socket[bytes], secret: bytes) -> None:
    """Make a socket, before it is bound, the engine's end for workers of other hosts."""
    socket.curve_secretkey, socket.curve_publickey = _pair(secret, "engine")
    socket.curve_server = True
    _keep_alive(socket)


def _keep_alive(socket: zmq.Socket[bytes]) -> None:
    socket.heartbeat_ivl = round(HEARTBEAT_S * 1000)
    socket.heartbeat_timeout = socket.heartbeat_ttl = round(HEARTBEAT_TIMEOUT_S * 1000)
    socket.reconnect_ivl_max = 1000


def _pair(secret: bytes, whose: str) -> tuple[bytes, bytes]:
    """(secret key, public key) of one end, as Z85 text. Any 32 bytes are a secret key of Curve25519."""
    if not zmq.has("curve"):
        raise RuntimeFault("this libzmq was built without CURVE", do="install pyzmq from its wheel")
    derived = z85.encode(hmac.digest(secret, f"mnemoc control, {whose}".encode(), hashlib.sha256))
    return derived, zmq.curve_public(derived)
