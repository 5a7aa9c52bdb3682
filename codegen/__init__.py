"""Planned IR → the artifact's files: kernels, per-role programs, cost function; the report; what starts it
elsewhere; and exports to other engines.
"""

from .emit import Emission, emit
from .export import ENGINES, Export, Subject, export
from .launch import Launch, render_launch
from .report import Report, render_report

__all__ = [
    "ENGINES",
    "Emission",
    "Export",
    "Launch",
    "Report",
    "Subject",
    "emit",
    "export",
    "render_launch",
    "render_report",
]
