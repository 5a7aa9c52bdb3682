"""Planned IR → the artifact's files: kernels, per-role programs, cost function."""

from .emit import Emission, emit

__all__ = ["Emission", "emit"]
