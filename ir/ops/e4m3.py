"""The 8-bit float e4m3: 4 bits of exponent, 3 of mantissa, up to ±448, no infinity.

After "FP8 Formats for Deep Learning" (arXiv 2209.05433).
"""

from __future__ import annotations

import numpy as np

from .base import Array

LARGEST = 448.0
_LEAST_EXPONENT = -6
_MANTISSA_BITS = 3


def nearest(x: Array) -> Array:
    """The nearest values of e4m3, ties to even; the largest one for whatever lies beyond it."""
    size = np.minimum(np.abs(x), LARGEST)
    exponent = np.maximum(np.frexp(size)[1] - 1, _LEAST_EXPONENT)
    step = np.ldexp(np.ones_like(size), exponent - _MANTISSA_BITS)
    return np.asarray(np.copysign(np.round(size / step) * step, x))


def scaled(x: Array) -> tuple[Array, Array]:
    """Rows [T, W] as e4m3, and the scale of each [T, 1] that gives them back."""
    most = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(most > 0, most, 1) / LARGEST
    return nearest(x / scale), scale
