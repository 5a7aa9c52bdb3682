"""How sure a prediction is: what its figures rest on, and whether the question stays where they were taken.

Each curve that a prediction uses was asked at some sizes and has points at some. Within them it interpolates,
beyond them it extrapolates. The band of a part is what its curve missed at its own points, plus what such
a source is usually off by, plus more per factor of ten of extrapolation. These allowances are judgement, not
measurement; bands of parts are added as if all erred to the same side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..artifact import FP8
from ..ir.model import ModelSpec
from ..units import format_count
from .chunks import Floats, Riders
from .cluster import Cluster
from .configuration import Configuration, slowest_link
from .curves import Curve
from .footprint import Footprint

ALLOWANCE: Mapping[str, float] = {"measured": 0.05, "published": 0.10, "datasheet": 0.15}
"""What a kind of source is off by, as a share; of all others, ASSUMED."""
ASSUMED = 0.25
PER_DECADE = 0.10
"""And by so much more for each factor of ten beyond the outermost point."""


@dataclass(frozen=True)
class Use:
    """What a part of a figure rests on.

    figure: "ttft" or "tbt"; part: of it; key: of the cluster file; asked: smallest and largest size;
    beyond: the factor by which they leave the points, 1 where they do not; band: ± as a share
    """

    figure: str
    part: str
    key: str
    asked: tuple[float, float] | None
    beyond: float
    band: float
    source: str
    words: str


@dataclass(frozen=True)
class Estimate:
    """Seconds with a band, and parts that add up to it."""

    seconds: float
    low_s: float
    high_s: float
    parts_s: Mapping[str, float]


def estimate(parts: Mapping[str, float], uses: Sequence[Use]) -> Estimate:
    """The bubble is as sure as all the rest."""
    bands = {use.part: use.band for use in uses}
    known = sum(seconds for part, seconds in parts.items() if part != "bubble")
    off = sum(seconds * bands[part] for part, seconds in parts.items() if part != "bubble")
    whole = sum(parts.values())
    share = off / known if known else 0.0
    return Estimate(whole, whole / (1 + share), whole * (1 + share), parts)


def uses_of(
    asked: Configuration,
    spec: ModelSpec,
    cluster: Cluster,
    held: Footprint,
    sizes: Floats,
    riders: Riders,
) -> tuple[Use, ...]:
    """What each part of each figure rests on, at the sizes of chunks and for the decodes that are asked."""
    few, many = float(sizes.min()), float(sizes.max())
    sharing = spec.num_heads / spec.num_kv_heads
    read = float(riders.count * riders.tokens * held.kv_per_token)
    weights = held.layer / 4  # of four products
    link = slowest_link(asked, cluster)
    fp8 = asked.precision.weights == FP8
    product = ("matmul_fp8" if fp8 else "matmul", (few, many), "")
    streamed = ("memory", (weights, weights), _WEIGHTS_FP8 if fp8 else "")
    cache = _CACHE_FP8 if asked.precision.kv_cache == FP8 else ""
    captured = "overhead.launch_captured"
    launch = captured if captured in cluster.numbers and not asked.eager else "overhead.launch"
    found = []
    for figure, linear, attention in (
        ("ttft", product, ("attention_prefill", (few * sharing, many * sharing), cache)),
        ("tbt", streamed, ("attention_decode", (read, read), cache)),
    ):
        found += [
            of_curve(cluster, figure, "linear", *linear),
            of_curve(cluster, figure, "attention", *attention),
            of_number(cluster, link, figure, "communication"),
            of_number(cluster, launch, figure, "launch"),
            of_curve(cluster, figure, "other", "memory", (weights, weights)),
        ]
    return tuple(found)


_WEIGHTS_FP8 = "of 16-bit weights, assumed for fp8"
_CACHE_FP8 = "of a 16-bit cache, assumed for fp8"


def of_curve(
    cluster: Cluster,
    figure: str,
    part: str,
    name: str,
    asked: tuple[float, float],
    assumed: str = "",
) -> Use:
    """A part that a curve prices, asked at sizes between two.

    assumed: what the curve was taken of, where that is something else: the band is then an assumption's
    """
    curve = cluster.curve(name)
    beyond = _beyond(curve, asked)
    allowance = max(_allowance(curve.source), ASSUMED if assumed else 0.0)
    band = curve.residual + allowance + PER_DECADE * math.log10(beyond)
    words = f"{_sizes(asked, curve.unit)}: {_covered(curve, beyond)}"
    words += f", {assumed}" if assumed else ""
    return Use(figure, part, f"efficiency.{name}", asked, beyond, band, curve.source, words)


def of_number(cluster: Cluster, key: str, figure: str, part: str) -> Use:
    """A part that one figure prices."""
    source = cluster.numbers[key].source
    return Use(
        figure, part, key, None, 1.0, _allowance(source), source, "one figure for every size"
    )


def kind(source: str) -> str:
    """ "measured", "published", "datasheet" or "assumed": the first word of a source says it."""
    word = source.partition(":")[0].split()[0].lower() if source.strip() else ""
    return word if word in ALLOWANCE else "assumed"


def _allowance(source: str) -> float:
    return ALLOWANCE.get(kind(source), ASSUMED)


def _beyond(curve: Curve, asked: tuple[float, float]) -> float:
    if not curve.points:
        return 1.0
    small, large = (max(size, 1e-9) for size in asked)
    return max(1.0, curve.smallest / small, large / curve.largest)


def _sizes(asked: tuple[float, float], unit: str) -> str:
    small, large = (format_count(size) for size in asked)
    return f"{small} {unit}" if small == large else f"{small} to {large} {unit}"


def _covered(curve: Curve, beyond: float) -> str:
    if not curve.points:
        return "one figure for every size"
    if len(curve.points) == 1:
        where = f"one point at {format_count(curve.smallest)} {curve.unit}"
        return where if beyond < 2 else f"extrapolates {beyond:.3g}× from {where}"
    where = f"points from {format_count(curve.smallest)} to {format_count(curve.largest)}"
    return f"interpolates {where}" if beyond == 1 else f"extrapolates {beyond:.3g}× from {where}"
