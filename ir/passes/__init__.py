"""Passes: each a small file, valid IR in and valid IR out."""

from .carry import carry
from .fuse import fuse
from .lower import lower
from .one_shot import one_shot
from .overlap import overlap
from .quantize import quantize
from .shard import shard
from .stages import split_stages

__all__ = [
    "carry",
    "fuse",
    "lower",
    "one_shot",
    "overlap",
    "quantize",
    "shard",
    "split_stages",
]
