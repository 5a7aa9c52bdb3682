"""Names for what a page holds: the hash of its tokens and of all before them.

Keys and values depend on every token before, so a page may stand for another only if all of these agree.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16
"""128 bits: two different prefixes out of 10^12 pages share a name with a probability of 10^-15."""


def page_hashes(tokens: Sequence[int], page_size: int, known: Sequence[object] = ()) -> list[object]:
    """One hash for each whole page of `tokens`, each of everything up to its page's end.

    known: those of the first pages, computed before
    """
    hashes = list(known)
    whole = len(tokens) // page_size
    if len(hashes) >= whole:
        return hashes[:whole]
    first = len(hashes) * page_size
    data = memoryview(array("i", tokens[first : whole * page_size])).cast("B")
    width = page_size * array("i").itemsize
    before = hashes[-1] if hashes else b""
    for start in range(0, len(data), width):
        assert isinstance(before, bytes), "hashes of tokens go on from hashes of tokens"
        before = hashlib.blake2b(
            before + data[start : start + width], digest_size=DIGEST_BYTES
        ).digest()
        hashes.append(before)
    return hashes
