"""Frozen dataclasses ⇄ plain JSON values, with every field's name and type checked on the way in."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import BadInput

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Frozen dataclasses, tuples and mappings as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], value: Any, where: str) -> T:
    """The inverse of `to_json`; unknown, missing or wrongly typed fields are BadInput."""
    return typing.cast(T, _decode(cls, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in pairs)
    if origin is Mapping and isinstance(value, dict):
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise BadInput(f"expected {getattr(kind, '__name__', kind)}", where=where, got=value)


def _decode_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BadInput("expected an object", where=where, got=value)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(value.keys() - known.keys()):
        raise BadInput(
            f"unknown key {unknown[0]!r}", where=where, do=f"known keys: {', '.join(known)}"
        )
    required = (f.default is dataclasses.MISSING for f in known.values())
    factories = (f.default_factory is dataclasses.MISSING for f in known.values())
    for name, bare, fixed in zip(known, required, factories, strict=True):
        if bare and fixed and name not in value:
            raise BadInput(f"key {name!r} is missing", where=where)
    return cls(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in value.items()})
