"""Planned IR → the artifact's files: kernels, per-role programs, cost function; and the report."""

from .emit import Emission, emit
from .report import Report, render_report

__all__ = ["Emission", "Report", "emit", "render_report"]
