"""A bare HTTP client: it keeps to the protocol or breaks it, as told, and says when what came."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER of a socket whose end is a reset."""
SMALL_WINDOW, SMALL_SEGMENT = 4096, 536
"""Bytes that a client who does not read has room for: the rest is with the server. Bytes of a TCP segment."""


@dataclass(frozen=True)
class Reply:
    """What came back. ttft_s: to the first event with text, of a stream; seconds: to the end"""

    status: int
    content: bytes
    ttft_s: float | None
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """Of a stream: its objects; [DONE] is left out."""
        lines = self.content.decode().split("\n\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [json.loads(text) for text in data if text != "[DONE]"]

    @property
    def done(self) -> bool:
        """Whether a stream says that it is over."""
        return self.content.endswith(b"data: [DONE]\n\n")


def post(body: object, path: str = "/v1/completions") -> bytes:
    """A request as bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


async def ask(port: int, request: bytes) -> Reply:
    """Send a request on a connection of its own and read all of the answer."""
    began_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(None, 2)[1])
        if b"chunked" not in head.lower():
            found = re.search(rb"content-length: (\d+)", head.lower())
            content = await reader.readexactly(int(found[1]) if found else 0)
            return Reply(status, content, None, time.monotonic() - began_s)
        parts, ttft_s = [], None
        while size := int(await reader.readline(), 16):
            part = await reader.readexactly(size + 2)
            parts.append(part[:-2])
            if ttft_s is None and part.startswith(b"data: "):
                ttft_s = time.monotonic() - began_s
        return Reply(status, b"".join(parts), ttft_s, time.monotonic() - began_s)
    finally:
        writer.close()


def stalled(port: int, request: bytes) -> socket.socket:
    """A connection that has asked, for somebody who does not read.

    With the segments of a slow network: for those of this machine the kernel would hold some megabytes.
    """
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_WINDOW)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
    connection.connect(("127.0.0.1", port))
    connection.sendall(request)
    return connection


async def leave(port: int, request: bytes, *, after_s: float, reset: bool) -> None:
    """Send a request, or the part of one, and be gone some time later: with a reset, or by closing."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await asyncio.sleep(after_s)
    finally:
        if reset:
            end: socket.socket = writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        writer.transport.abort()
