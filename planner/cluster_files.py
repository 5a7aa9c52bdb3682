"""Where cluster files lie, and how one is written.

Shipped ones have names. `local`, this machine's CPU, is the exception that looks around: a measured file in
the per-user cache replaces the shipped figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import BadInput
from ..tiles import MeasuredTiles
from ..whole import write_whole
from .cluster import Cluster
from .cluster_text import CURVES, FIELDS, find, parse_cluster, tables
from .tiles import tile_entries

_SHIPPED = Path(__file__).parent / "clusters"


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
    measured = {
        key: {_form(value): value, "unit": unit, "source": source}
        for key, (value, unit, source) in figures.items()
    }
    entries: dict[str, object] = {
        "name": name,
        "device": device,
        "target": target,
        **_shipped(name),
        **measured,
        **({} if tiles is None else tile_entries(tiles)),
    }
    text = "".join(f"{key} = {_literal(entry)}\n" for key, entry in entries.items())
    cluster = parse_cluster(text, str(path))
    write_whole(path, text)
    return cluster


def _form(value: float | Sequence[tuple[float, ...]]) -> str:
    return "value" if isinstance(value, int | float) else "points"


def _shipped(name: str) -> dict[str, object]:
    """Dotted key → entry of a shipped file; {} where there is none of that name."""
    if name not in clusters():
        return {}
    path = _SHIPPED / f"{name}.toml"
    tree = tables(path.read_text(encoding="utf-8"), str(path))
    return {key: entry for key in (*FIELDS, *CURVES) if (entry := find(tree, key)) is not None}


def _literal(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{k} = {_literal(v)}' for k, v in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> Cluster:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("cannot read the cluster file", where=path, do=str(error)) from error
    return parse_cluster(text, str(path))
