"""Names for what a page holds: the hash of its tokens and of all before them.

Keys and values depend on every token before, so a page may stand for another only if all of these agree.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16
"""128 bits: among 10^12 pages, two prefixes share a name with a probability of 10^-15."""

SLICE = 2**14


def page_hashes(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """One hash for each whole page of `tokens`."""
    whole = len(tokens) // page_size * page_size
    ids = array("i")
    for start in range(0, whole, SLICE):  # in one call, a million would keep all threads waiting
        ids.extend(tokens[start : min(start + SLICE, whole)])
    data = memoryview(ids).cast("B")
    width = page_size * array("i").itemsize
    hashes: list[bytes] = []
    before = b""
    for start in range(0, len(data), width):
        before = _digest(before, data[start : start + width])
        hashes.append(before)
    return hashes


def page_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of one more page, behind the one whose hash is `before` (b"": the first)."""
    return _digest(before, memoryview(array("i", tokens)).cast("B"))


def _digest(before: bytes, data: memoryview) -> bytes:
    digest = hashlib.blake2b(before, digest_size=DIGEST_BYTES)
    digest.update(data)
    return digest.digest()
