"""Symbolic sizes: one maker of symbols, six symbols that say all that cost needs.

A micro-batch is ragged: prefill chunks of several requests and decodes together. All six count what
one KVP group sees of it:

    T    new tokens (rows)
    R    sequences that need logits (rows of the head)
    QK   query–key pairs of prefill segments; a chunk of c tokens after n has c·n + c(c+1)/2
    KV   cached tokens that prefill segments read; that chunk reads n + c
    KD   cached tokens that decodes read
    X    rows of partial attention results swapped with KVP peers: sent or received, whichever are more
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import sympy


@cache
def symbol(name: str) -> sympy.Symbol:
    """The symbol of that name: a positive integer. Symbols made elsewhere would not be equal to it."""
    return sympy.Symbol(name, integer=True, positive=True)


T, R, QK, KV, KD, X = SYMBOLS = tuple(symbol(name) for name in ("T", "R", "QK", "KV", "KD", "X"))

Size: TypeAlias = int | sympy.Expr


@cache
def any_of(symbol: sympy.Symbol) -> sympy.Expr:
    """1 where there is any of it, else 0. Symbols are positive to sympy, and really may be 0."""
    return sympy.Min(1, symbol, evaluate=False)


def normal(size: Size) -> Size:
    """The one normal form: a Python int where it is a number, expanded otherwise."""
    if isinstance(size, int):
        return size
    size = sympy.expand(size)
    return int(size) if size.is_Integer else size
