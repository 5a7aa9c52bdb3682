"""What a cluster is: a TOML file in which every number carries its unit and its source.

    bandwidth = { value = 3.35, unit = "TB/s", source = "datasheet: H100 SXM" }

and an efficiency that grows with size is given by points, [size, share], as measured or published
(see `curves`); a share that is the same at every size is written like any other number:

    attention_decode = { points = [[67e6, 0.43], [537e6, 0.82]], unit = "B", source = "published: ..." }

How fast kernels were measured to be, ours and others', may be added (see `speeds`), and how ours are best cut
(see `tiles`).

Values are turned into base units (FLOP/s, B/s, B, s) when read. Unknown keys, missing keys, wrong
units and impossible numbers are BadInput: what is unknown is an error, never an invented number.

`local`, this machine's CPU, is the exception that looks around: cores and memory marked "auto" are
read from the machine, and a measured file in the per-user cache replaces the shipped figures.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..codec import to_json
from ..errors import BadInput
from ..speeds import KernelSpeeds
from ..tiles import MeasuredTiles
from .curves import Curve, read_curve
from .speeds import TABLE as SPEEDS
from .speeds import read_speeds
from .tiles import TABLE as TILES
from .tiles import read_tiles, tile_entries

CALIBRATED = "measured by mnemoc calibrate on this machine"
"""The source of a figure that was measured on the machine itself."""

_SHIPPED = Path(__file__).parent / "clusters"

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
TEXTS = ("name", "device", "target")
TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cpu")
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


@dataclass(frozen=True)
class Quantity:
    """A number in base units, and where it comes from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes of equal devices.

    origin: the file it was read from, for errors and notes
    numbers: every single figure by its dotted key; curves: every efficiency that grows, by its name
    kernels: measured speeds of kernels, by op and provider, where anybody measured them
    tiles: what our own kernels are cut by, where anybody measured that
    """

    name: str
    device: str
    target: str
    origin: str
    numbers: Mapping[str, Quantity]
    curves: Mapping[str, Curve]
    kernels: KernelSpeeds = field(default_factory=dict)
    tiles: MeasuredTiles | None = None

    def __getitem__(self, key: str) -> float:
        """A figure in base units; BadInput if the file does not know it."""
        if key not in self.numbers:
            raise BadInput(
                f"{key} of this cluster is not known",
                where=self.origin,
                do=f"add `{key} = {{ value = ..., unit = ..., source = ... }}`",
            )
        return self.numbers[key].value

    def curve(self, name: str) -> Curve:
        """An efficiency that grows; BadInput if the file does not know it."""
        if name not in self.curves:
            raise BadInput(
                f"efficiency.{name} of this cluster is not known",
                where=self.origin,
                do=f"add `efficiency.{name} = {{ points = ..., unit = ..., source = ... }}`",
            )
        return self.curves[name]

    @property
    def nodes(self) -> int:
        return round(self["nodes"])

    @property
    def devices_per_node(self) -> int:
        return round(self["devices_per_node"])

    @property
    def switched(self) -> int:
        """Devices behind one switch, by which each reads any other's memory over all of its links; or 0."""
        return round(self["links.intra.switched"]) if "links.intra.switched" in self.numbers else 0

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def describe(self) -> dict[str, Any]:
        """As plain data, for manifests. Where the file lay on this machine is left out."""
        numbers = {key: dataclasses.asdict(q) for key, q in self.numbers.items()}
        curves = {name: dataclasses.asdict(curve) for name, curve in self.curves.items()}
        texts = {key: getattr(self, key) for key in TEXTS}
        kernels = {
            op: {name: dataclasses.asdict(measured) for name, measured in table.items()}
            for op, table in self.kernels.items()
        }
        more: dict[str, Any] = {"kernels": kernels} if kernels else {}
        if self.tiles is not None:
            more["tiles"] = to_json(self.tiles)
        return texts | {"numbers": numbers, "curves": curves} | more

    @property
    def usable_bytes(self) -> int:
        """Memory that a plan may fill on one device."""
        return int(self["memory.capacity"] - self["memory.reserve"])

    @property
    def host_bytes(self) -> int:
        """What a device may keep of its node's own memory; 0 where nothing is said of that."""
        if "host.memory" not in self.numbers:
            return 0
        return int(self["host.memory"] * self["host.share"] / self.devices_per_node)

    @property
    def communicator_bytes(self) -> int:
        """What NCCL allocates for one process group; gloo, on CPUs, has no buffers of such a size."""
        return 0 if self.target == "cpu" else int(self["memory.communicator"])


def clusters() -> tuple[str, ...]:
    """Names of the shipped clusters."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.toml")))


def load_cluster(name_or_path: str) -> Cluster:
    """A shipped cluster by name, or the TOML file at a path. BadInput says what is wrong with it."""
    if name_or_path == "local" and (measured := measured_path()).exists():
        return _read(measured)
    if name_or_path in clusters():
        return _read(_SHIPPED / f"{name_or_path}.toml")
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.exists():
        raise BadInput(
            f"unknown cluster {name_or_path!r}",
            do=f"name one of {', '.join(clusters())}, or a TOML file",
        )
    return _read(path)


def measured_path() -> Path:
    """Where figures measured on this machine are kept: $MNEMOC_CACHE or ~/.cache/mnemoc."""
    cache = os.environ.get("MNEMOC_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "mnemoc") / "local.toml"


def write_cluster(
    path: Path,
    *,
    name: str,
    device: str,
    target: str,
    figures: Mapping[str, tuple[float | Sequence[tuple[float, ...]], str, str]],
    tiles: MeasuredTiles | None = None,
) -> Cluster:
    """Write a cluster file from dotted key → (value or points, unit, source), and read it back.

    Keys that `figures` lacks are taken from the shipped file of that name, if there is one.
    """
    shipped = _SHIPPED / f"{name}.toml"
    tree = _tables(shipped.read_text(), str(shipped)) if shipped.exists() else {}
    keys = (*FIELDS, *CURVES)
    entries = {key: entry for key in keys if (entry := _find(tree, key)) is not None}
    for key, (value, unit, source) in figures.items():
        what = "value" if isinstance(value, int | float) else "points"
        entries[key] = {what: value, "unit": unit, "source": source}
    lines = [f"{key} = {json.dumps(text)}" for key, text in _texts(name, device, target)]
    for key, entry in entries.items():
        lines.append(f"{key} = {_literal(entry)}")
    if tiles is not None:
        lines += [f"{key} = {_literal(value)}" for key, value in tile_entries(tiles).items()]
    text = "\n".join(lines) + "\n"
    cluster = _parse(text, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(text)
        aside.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write: {error.strerror}", where=path) from error
    return cluster


def _texts(name: str, device: str, target: str) -> tuple[tuple[str, str], ...]:
    return ("name", name), ("device", device), ("target", target)


def _literal(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{k} = {_literal(v)}' for k, v in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


# -------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> Cluster:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("cannot read the cluster file", where=path, do=str(error)) from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Cluster:
    tree = _tables(text, where)
    _refuse_unknown_keys(tree, where)
    texts = {key: _text(tree, key, where) for key in TEXTS}
    if texts["target"] not in TARGETS:
        raise BadInput(
            f"unknown target {texts['target']!r}", where=where, do=f"one of {', '.join(TARGETS)}"
        )
    numbers: dict[str, Quantity] = {}
    for key, kind in FIELDS.items():
        entry = _find(tree, key)
        if entry is not None:
            numbers[key] = _quantity(entry, key, kind, where, texts["target"])
        elif key not in OPTIONAL:
            raise BadInput(f"key {key!r} is missing", where=where)
    curves = {}
    for key, units in CURVES.items():
        if (entry := _find(tree, key)) is not None:
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


def _tables(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"not valid TOML: {error}", where=where) from error


def _find(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def _refuse_unknown_keys(tree: Mapping[str, Any], where: str) -> None:
    known = {*TEXTS, *FIELDS, *CURVES}
    tables = {".".join(k.split(".")[:i]) for k in known for i in range(1, k.count(".") + 1)}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in (SPEEDS, TILES):
                continue  # those who read them know
            if key in tables and isinstance(value, dict):
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
