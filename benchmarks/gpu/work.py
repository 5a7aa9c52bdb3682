"""Operations and bytes of everything that is measured: the least that any implementation does.

A multiply and an add are two operations. Bytes are those of device memory, each input read once and each
output written once; what a kernel moves beyond that counts against it. b is the size of an element.

    attention    4·d operations per query–key pair and query head: d multiply–adds for the score and d for the
                 output (FlashAttention-2, arXiv 2307.08691, section 4.1, counts the same)
    a chunk      of c tokens after n: c·n + c·(c + 1)/2 pairs; causal pairs only, masked ones are no work
    a product    2·m·n·k
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """What attention of one rank looks like. name: whose it is."""

    name: str
    query: int
    kv: int
    dim: int = 128

    @property
    def group(self) -> int:
        return self.query // self.kv

    def kv_bytes(self, tokens: int, element: int) -> int:
        """K and V of so many tokens."""
        return 2 * tokens * self.kv * self.dim * element

    def row_bytes(self, rows: int, element: int) -> int:
        """Queries read, outputs and their log-sum-exps written."""
        return rows * self.query * (2 * self.dim * element + 4)


def chunk_pairs(chunk: int, past: int) -> int:
    """Query–key pairs of a chunk after `past` tokens, all of which it sees, and itself causally."""
    return chunk * past + chunk * (chunk + 1) // 2


def attention_flops(heads: Heads, pairs: int) -> int:
    return 4 * heads.dim * heads.query * pairs


def prefill_bytes(heads: Heads, chunk: int, past: int, element: int, kv_element: int) -> int:
    return heads.kv_bytes(past + chunk, kv_element) + heads.row_bytes(chunk, element)


def decode_bytes(heads: Heads, requests: int, tokens: int, element: int, kv_element: int) -> int:
    """One new token of each request, of `tokens` cached ones with it."""
    return heads.kv_bytes(requests * tokens, kv_element) + heads.row_bytes(requests, element)


def product_flops(m: int, n: int, k: int) -> int:
    return 2 * m * n * k


def rms_norm_bytes(rows: int, hidden: int, b: int) -> int:
    """The rows read and written, and the weights."""
    return 2 * rows * hidden * b + hidden * b


def add_rms_norm_bytes(rows: int, hidden: int, b: int) -> int:
    """Two inputs, the sum and its norm; the weights."""
    return 4 * rows * hidden * b + hidden * b


def all_reduce_add_bytes(rows: int, ranks: int, hidden: int, b: int) -> int:
    """Each rank's rows and the residual read, the sum written."""
    return (ranks + 2) * rows * hidden * b


def all_reduce_add_rms_norm_bytes(rows: int, ranks: int, hidden: int, b: int) -> int:
    """The same, and its norm; the weights."""
    return (ranks + 3) * rows * hidden * b + hidden * b


def swiglu_bytes(rows: int, ffn: int, b: int) -> int:
    """Gate and up read, one output."""
    return 3 * rows * ffn * b


def rope_append_bytes(rows: int, heads: Heads, b: int, kv_element: int) -> int:
    """q, k and v read; q written, k and v stored; cosines and sines in float32; a 64-bit slot."""
    read = (heads.query + 2 * heads.kv) * heads.dim * b
    written = heads.query * heads.dim * b + 2 * heads.kv * heads.dim * kv_element
    return rows * (read + written + 4 * heads.dim + 8)


def quantised_bytes(rows: int, columns: int) -> int:
    """Rows written as e4m3, with a float32 scale each."""
    return rows * (columns + 4)


def pack_bytes(rows: int, heads: Heads, b: int) -> int:
    """Outputs and log-sum-exps read and written side by side; a 64-bit row number."""
    return rows * (heads.query * 2 * (heads.dim * b + 4) + 8)


def merge_bytes(rows: int, peers: int, heads: Heads, b: int) -> int:
    """Own outputs and log-sum-exps read and written once, each peer's part read; a 32-bit place of each."""
    part = heads.query * (heads.dim * b + 4)
    return rows * (2 * part + peers * (part + 4))
