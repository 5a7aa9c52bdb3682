"""What a cluster's TOML may say: every number carries its unit and its source.

    bandwidth = { value = 3.35, unit = "TB/s", source = "datasheet: H100 SXM" }

and an efficiency that grows with size is given by points, [size, share], as measured or published
(see `curves`); a share that is the same at every size is written like any other number:

    attention_decode = { points = [[67e6, 0.43], [537e6, 0.82]], unit = "B", source = "published: ..." }

How fast kernels were measured to be, ours and others', may be added (see `speeds`), and how ours are best cut
(see `tiles`).

Values are turned into base units (FLOP/s, B/s, B, s) when read. Unknown keys, missing keys, wrong
units and impossible numbers are BadInput.
Of a CPU, cores and memory marked "auto" are read from the machine.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from typing import Any

from ..errors import BadInput
from .cluster import TARGETS, TEXTS, Cluster, Quantity
from .curves import read_curve
from .speeds import TABLE as SPEEDS
from .speeds import read_speeds
from .tiles import TABLE as TILES
from .tiles import read_tiles

UNITS: Mapping[str, Mapping[str, float]] = {
    "speed": {"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12},
    "bandwidth": {"B/s": 1.0, "GB/s": 1e9, "TB/s": 1e12},
    "size": {"B": 1.0, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30},
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "share": {"1": 1.0},
    "nodes": {"nodes": 1.0},
    "devices": {"devices": 1.0},
    "price": {"USD/h": 1.0},
}

# Every number of a cluster file, by dotted key → its kind of unit.
FIELDS: Mapping[str, str] = {
    "nodes": "nodes",
    "devices_per_node": "devices",
    "peak.bfloat16": "speed",
    "peak.float16": "speed",
    "peak.float32": "speed",
    "peak.float8": "speed",
    "memory.bandwidth": "bandwidth",
    "memory.shared_bandwidth": "bandwidth",
    "memory.capacity": "size",
    "memory.reserve": "size",
    "memory.communicator": "size",
    "efficiency.link": "share",
    "overhead.launch": "time",
    "overhead.launch_captured": "time",
    "overhead.iteration": "time",
    "overhead.row": "time",
    "links.intra.latency": "time",
    "links.intra.bandwidth": "bandwidth",
    "links.intra.switched": "devices",
    "links.inter.latency": "time",
    "links.inter.bandwidth": "bandwidth",
    "host.latency": "time",
    "host.bandwidth": "bandwidth",
    "host.memory": "size",
    "host.share": "share",
    "price.device_hour": "price",
}
HOST = tuple(key for key in FIELDS if key.startswith("host."))
"""A node's own memory, the share of it that pages may take, and each device's way to it, as it is reached;
latency is that of a layer's pages. Given all together or not at all."""
OPTIONAL = {
    "memory.communicator",
    "peak.bfloat16",
    "peak.float16",
    "peak.float32",
    "peak.float8",
    "efficiency.matmul_fp8",
    "memory.shared_bandwidth",
    "links.intra.switched",
    "overhead.launch_captured",
    "overhead.row",
    "price.device_hour",
    *HOST,
}

# Every curve, by dotted key → the unit of its sizes.
CURVES: Mapping[str, Mapping[str, float]] = {
    "efficiency.matmul": {"rows": 1.0},
    "efficiency.matmul_fp8": {"rows": 1.0},
    "efficiency.attention_prefill": {"rows": 1.0},
    "efficiency.attention_decode": UNITS["size"],
    "efficiency.memory": UNITS["size"],
}
_MAY_BE_ZERO = {
    "memory.reserve",
    "overhead.launch",
    "overhead.launch_captured",
    "overhead.iteration",
    "overhead.row",
    "host.latency",
    "price.device_hour",
}
_AUTO = {"devices_per_node", "memory.capacity", "host.memory"}


def parse_cluster(text: str, where: str) -> Cluster:
    """A cluster file's text, read and checked. where: what to call it in errors"""
    tree = tables(text, where)
    _refuse_unknown_keys(tree, where)
    texts = {key: _text(tree, key, where) for key in TEXTS}
    if texts["target"] not in TARGETS:
        raise BadInput(
            f"unknown target {texts['target']!r}", where=where, do=f"one of {', '.join(TARGETS)}"
        )
    numbers: dict[str, Quantity] = {}
    for key, kind in FIELDS.items():
        entry = find(tree, key)
        if entry is not None:
            numbers[key] = _quantity(entry, key, kind, where, texts["target"])
        elif key not in OPTIONAL:
            raise BadInput(f"key {key!r} is missing", where=where)
    curves = {}
    for key, units in CURVES.items():
        if (entry := find(tree, key)) is not None:
            curves[key.rpartition(".")[2]] = read_curve(entry, key, units, where)
        elif key not in OPTIONAL:
            raise BadInput(f"key {key!r} is missing", where=where)
    lacking = [key for key in HOST if key not in numbers]
    if 0 < len(lacking) < len(HOST):
        do = "say all of [host] or nothing"
        raise BadInput(f"key {lacking[0]!r} is missing", where=where, do=do)
    if not any(key.startswith("peak.") for key in numbers):
        raise BadInput("no peak speed is given", where=where, do="add [peak] with a dtype")
    if numbers["memory.reserve"].value >= numbers["memory.capacity"].value:
        raise BadInput("memory.reserve leaves nothing of memory.capacity", where=where)
    return Cluster(
        **texts,
        origin=where,
        numbers=numbers,
        curves=curves,
        kernels=read_speeds(tree.get(SPEEDS), where),
        tiles=read_tiles(tree.get(TILES), texts["target"], where),
    )


def tables(text: str, where: str) -> dict[str, Any]:
    """As TOML has it."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"not valid TOML: {error}", where=where) from error


def find(tree: Mapping[str, Any], key: str) -> Any:
    """What stands under a dotted key; None: nothing"""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def _refuse_unknown_keys(tree: Mapping[str, Any], where: str) -> None:
    known = {*TEXTS, *FIELDS, *CURVES}
    above = {".".join(k.split(".")[:i]) for k in known for i in range(1, k.count(".") + 1)}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in (SPEEDS, TILES):
                continue  # those who read them know
            if key in above and isinstance(value, dict):
                walk(value, f"{key}.")
            elif key not in known:
                near = sorted(k for k in known if k.rpartition(".")[0] == prefix.rstrip("."))
                raise BadInput(
                    f"unknown key {key!r}", where=where, do=f"known keys here: {', '.join(near)}"
                )

    walk(tree, "")


def _text(tree: Mapping[str, Any], key: str, where: str) -> str:
    value = tree.get(key)
    if not isinstance(value, str) or not value:
        raise BadInput(f"key {key!r} must be a text", where=where, got=value)
    return value


def _quantity(entry: Any, key: str, kind: str, where: str, target: str) -> Quantity:
    if not isinstance(entry, dict) or set(entry) != {"value", "unit", "source"}:
        raise BadInput(
            f"{key} must be {{ value = ..., unit = ..., source = ... }}", where=where, got=entry
        )
    value, unit, source = entry["value"], entry["unit"], entry["source"]
    if not isinstance(source, str) or not source.strip():
        raise BadInput(f"{key} has no source", where=where, got=source)
    if unit not in UNITS[kind]:
        raise BadInput(f"{key} has a wrong unit", where=where, got=unit, do=_units(kind))
    if value == "auto" and key in _AUTO and target == "cpu":
        return Quantity(float(_machine(key)), next(iter(UNITS[kind])), source)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"{key} is not a number", where=where, got=value)
    if value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
        raise BadInput(f"{key} must be positive", where=where, got=value)
    if kind == "share" and value > 1:
        raise BadInput(f"{key} is a share of a peak: at most 1", where=where, got=value)
    if kind in ("nodes", "devices") and value != round(value):
        raise BadInput(f"{key} must be a whole number", where=where, got=value)
    return Quantity(value * UNITS[kind][unit], next(iter(UNITS[kind])), source)


def _units(kind: str) -> str:
    return f"write it in {' or '.join(UNITS[kind])}"


def _machine(key: str) -> int:
    """Cores of this machine, its memory in bytes, or one core's share of that."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not cores:
        raise BadInput("cannot tell how many cores this machine has")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"devices_per_node": cores, "host.memory": memory}.get(key, memory // cores)
