"""Model, cluster and promise → plan: cost model, chunk schedule, program for HiGHS, explanation."""

from .cluster import CALIBRATED, Cluster
from .cluster_files import clusters, load_cluster, measured_path, write_cluster
from .configuration import Configuration
from .curves import through
from .evidence import Estimate
from .forecast import Forecast, forecast
from .formulas import StageFormulas
from .frontier import frontier
from .plan import Made, make_plan, plan_of
from .price import one_layer, whole_layers
from .speeds import OPS as SPEED_UNITS
from .timeline import make_timeline
from .what_if import Answer, WhatIf

__all__ = [
    "CALIBRATED",
    "SPEED_UNITS",
    "Answer",
    "Cluster",
    "Configuration",
    "Estimate",
    "Forecast",
    "Made",
    "StageFormulas",
    "WhatIf",
    "clusters",
    "forecast",
    "frontier",
    "load_cluster",
    "make_plan",
    "make_timeline",
    "measured_path",
    "one_layer",
    "plan_of",
    "through",
    "whole_layers",
    "write_cluster",
]
