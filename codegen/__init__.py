"""Planned IR → the artifact's files: kernels, per-role programs, cost function; the report; and exports
to other engines.
"""

from .emit import Emission, emit
from .export import ENGINES, Export, Subject, export
from .report import Report, render_report

__all__ = ["ENGINES", "Emission", "Export", "Report", "Subject", "emit", "export", "render_report"]
