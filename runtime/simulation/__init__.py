"""The engine without machines: the same scheduler on a virtual clock, fed by traces or invented traffic."""

from __future__ import annotations

from ..scheduling.limits import Limits
from .capacity import Question, find_capacity
from .engine import ENGINES, OURS, Asked, Simulation
from .result import Capacity, ClassResult, Result, Spread
from .traces import Trace
from .traffic import LEAST_QPS, MOST_QPS, Arrival, Survey, Traffic, survey
from .workload import Workload, load_workload, shipped

__all__ = [
    "ENGINES",
    "LEAST_QPS",
    "MOST_QPS",
    "OURS",
    "Arrival",
    "Asked",
    "Capacity",
    "ClassResult",
    "Limits",
    "Question",
    "Result",
    "Simulation",
    "Spread",
    "Survey",
    "Trace",
    "Traffic",
    "Workload",
    "find_capacity",
    "load_workload",
    "shipped",
    "survey",
]
