"""Reads what a cluster file says of kernels: [kernels.attention_prefill] and [kernels.attention_decode].

    [kernels.attention_prefill]  # [rows that share a KV head's keys, keys, speed]
    triton = { points = [[128, 131072, 310], [8192, 131072, 560]], unit = "TFLOP/s", source = "..." }
    flash_attn_3 = { points = [[128, 131072, 290], [8192, 131072, 640]], unit = "TFLOP/s", source = "..." }

    [kernels.attention_decode]  # [requests, keys of each, speed]
    triton = { points = [[1, 131072, 2.4]], unit = "TB/s", source = "..." }

Names of providers are codegen's: any is read here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from ..errors import BadInput
from ..speeds import KernelSpeeds, Speeds

OPS: Mapping[str, Mapping[str, float]] = {
    "attention_prefill": {"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12},
    "attention_decode": {"B/s": 1.0, "GB/s": 1e9, "TB/s": 1e12},
}
"""By op, the units of its speeds, the base unit first."""

TABLE = "kernels"
"""The key of a cluster file under which they stand."""


def read_speeds(tree: Any, where: str) -> KernelSpeeds:
    """The [kernels] of a cluster file, speeds in base units; {} where there is none."""
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(table, dict) for table in tree.values()):
        raise BadInput("[kernels] holds tables by op", where=where, do=f"write {_known()}")
    if unknown := sorted(tree.keys() - OPS.keys()):
        raise BadInput(f"unknown key 'kernels.{unknown[0]}'", where=where, do=f"write {_known()}")
    return {
        op: {
            name: _speeds(entry, f"kernels.{op}.{name}", OPS[op], where)
            for name, entry in t.items()
        }
        for op, t in tree.items()
    }


def _known() -> str:
    return " or ".join(f"[kernels.{op}]" for op in OPS)


def _speeds(entry: Any, key: str, units: Mapping[str, float], where: str) -> Speeds:
    how = f'write {key} = {{ points = [[SIZE, KEYS, SPEED], ...], unit = "...", source = "..." }}'
    if not isinstance(entry, dict) or set(entry) != {"points", "unit", "source"}:
        raise BadInput(f"{key} must be a table of speeds", where=where, got=entry, do=how)
    points, unit, source = entry["points"], entry["unit"], entry["source"]
    if not isinstance(source, str) or not source.strip():
        raise BadInput(f"{key} has no source", where=where, got=source)
    if unit not in units:
        do = f"write it in {' or '.join(units)}"
        raise BadInput(f"{key} has a wrong unit", where=where, got=unit, do=do)
    if not isinstance(points, list) or not points:
        raise BadInput(f"{key} has no points", where=where, got=points, do=how)
    for point in points:
        if not isinstance(point, list) or len(point) != 3 or not all(map(_positive, point)):
            raise BadInput(
                f"a point of {key} is not three positive numbers", where=where, got=point
            )
    sizes = [tuple(point[:2]) for point in points]
    if any(before >= after for before, after in itertools.pairwise(sizes)):
        do = "sort the points by size, then keys, and name each pair once"
        raise BadInput(f"points of {key} do not ascend", where=where, do=do)
    scale = units[unit]
    read = tuple((float(size), float(keys), speed * scale) for size, keys, speed in points)
    return Speeds(read, next(iter(units)), source)


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
