"""Rotary position embedding: the frequencies of a model, bit for bit as its makers compute them.

    default   inv_freq_i = θ^(−2i/d)
    linear    inv_freq_i / s
    llama3    wavelengths over original/low are divided by s, those under original/high kept, a
              linear blend between (Llama 3.1)
    yarn      kept below the ramp's low dim, interpolated by s above its high one, and cos, sin
              multiplied by the attention factor 0.1·ln s + 1 (arXiv 2309.00071)

Models are trained with float32 tables: at position 1 M an error of one unit in the last place of
inv_freq turns the angle by 0.06 rad. So each step below rounds to float32 where the Hugging Face
implementation does, which means torch's steps: a number over a tensor is the number times the
tensor's reciprocal. (Torch's float32 power may itself miss the nearest float32 by one unit, in one
value of a hundred; which one depends on the CPU. Ours is always the nearest.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """θ, the kind of scaling, and what that kind reads.

    attention_factor multiplies cos and sin (yarn; 1 for the others).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def inv_freq(self, head_dim: int) -> tuple[float, ...]:
        """Radians per position of the head_dim / 2 pairs; each value is a float32."""
        powers = [_f32(_f32(self.theta) ** _f32(i / head_dim)) for i in range(0, head_dim, 2)]
        base = [_f32(1.0 / power) for power in powers]
        if self.kind == "linear":
            return tuple(_f32(f / _f32(self.factor)) for f in base)
        if self.kind == "llama3":
            return tuple(self._llama3(f) for f in base)
        if self.kind == "yarn":
            low, high = self._yarn_range(head_dim)
            ramp = (_f32(_f32(i - _f32(low)) / _f32(high - low)) for i in range(len(base)))
            return tuple(map(self._yarn, powers, ramp))
        return tuple(base)

    def _llama3(self, inv_freq: float) -> float:
        low, high, s = self.low_freq_factor, self.high_freq_factor, _f32(self.factor)
        wavelength = _f32(_f32(1.0 / inv_freq) * _f32(2 * math.pi))
        if wavelength < _f32(self.original_max_position / high):
            return inv_freq
        if wavelength > _f32(self.original_max_position / low):
            return _f32(inv_freq / s)
        turns = _f32(_f32(1.0 / wavelength) * self.original_max_position)
        kept = _f32(_f32(turns - _f32(low)) / _f32(high - low))
        scaled = _f32(_f32(_f32(1 - kept) * inv_freq) / s)
        return _f32(scaled + _f32(kept * inv_freq))

    def _yarn_range(self, head_dim: int) -> tuple[float, float]:
        """The dims between which interpolation fades in, by turns over the original context."""

        def dim_of(turns: float) -> float:
            ratio = self.original_max_position / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = dim_of(self.beta_fast), dim_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        return low, high

    def _yarn(self, power: float, ramp: float) -> float:
        kept = _f32(1 - min(max(ramp, 0.0), 1.0))
        interpolated = _f32(1.0 / _f32(_f32(self.factor) * power))
        extrapolated = _f32(1.0 / power)
        return _f32(_f32(interpolated * _f32(1 - kept)) + _f32(extrapolated * kept))


def _f32(value: float) -> float:
    """The nearest float32. One float64 operation on float32s, then this, equals the float32 one."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def read_rope(config: Mapping[str, Any], where: str) -> Rope:
    """Rope of a config.json: `rope_theta` and `rope_scaling`, or the newer `rope_parameters`."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise BadInput("expected an object", where=f"{where}: rope_scaling", got=scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in KINDS:
        raise BadInput(
            f"RoPE scaling {kind!r} is not supported",
            where=where,
            do=f"supported: {', '.join(KINDS)}",
        )
    original = config.get("original_max_position_embeddings")  # outside it, it wins over inside
    known = (
        scaling if original is None else scaling | {"original_max_position_embeddings": original}
    )
    numbers = _Numbers(known, f"{where}: rope_scaling")
    theta = scaling.get("rope_theta", config.get("rope_theta", 10_000.0))
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (1, None):
        raise BadInput(
            "RoPE over a part of the head is not supported", where=f"{where}: partial_rotary_factor"
        )
    theta = _Numbers({"rope_theta": theta}, where).positive("rope_theta")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=numbers.positive("factor"))
    longest = config.get("max_position_embeddings")
    original = numbers.positive("original_max_position_embeddings", default=longest)
    if kind == "llama3":
        low, high = numbers.positive("low_freq_factor"), numbers.positive("high_freq_factor")
        if high <= low:
            raise BadInput(
                "high_freq_factor must be greater than low_freq_factor",
                where=numbers.where,
                got=high,
            )
        return Rope(
            theta,
            kind,
            factor=numbers.positive("factor"),
            original_max_position=int(original),
            low_freq_factor=low,
            high_freq_factor=high,
        )
    ratio = longest / original if isinstance(longest, int) else None
    factor = numbers.positive("factor", default=ratio)
    return Rope(
        theta,
        kind,
        factor=factor,
        attention_factor=_yarn_attention(numbers, factor),
        original_max_position=int(original),
        beta_fast=numbers.positive("beta_fast", default=32),
        beta_slow=numbers.positive("beta_slow", default=1),
        truncate=bool(scaling.get("truncate", True)),
    )


def _yarn_attention(numbers: _Numbers, factor: float) -> float:
    """0.1·ln s + 1, or the ratio of two such with their own weights, or as the config says."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if numbers.values.get("attention_factor") is not None:
        return numbers.positive("attention_factor")
    if numbers.values.get("mscale") and numbers.values.get("mscale_all_dim"):
        return scale(numbers.positive("mscale")) / scale(numbers.positive("mscale_all_dim"))
    return scale(1.0)


@dataclass(frozen=True)
class _Numbers:
    """Positive numbers out of a JSON object; what is missing or no number is BadInput."""

    values: Mapping[str, Any]
    where: str

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise BadInput(f"key {key!r} is missing", where=self.where)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise BadInput(f"{key} must be a positive number", where=self.where, got=value)
        return float(value)
