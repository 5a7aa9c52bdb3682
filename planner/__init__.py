"""Model, cluster and promise → plan: cost model, chunk schedule, program for HiGHS, explanation."""

from .cluster import CALIBRATED, Cluster, clusters, load_cluster, measured_path, write_cluster
from .configuration import Configuration
from .cost import StageFormulas
from .curves import through
from .evidence import Estimate
from .forecast import Forecast, forecast
from .plan import Made, make_plan
from .price import one_layer
from .timeline import make_timeline

__all__ = [
    "CALIBRATED",
    "Cluster",
    "Configuration",
    "Estimate",
    "Forecast",
    "Made",
    "StageFormulas",
    "clusters",
    "forecast",
    "load_cluster",
    "make_plan",
    "make_timeline",
    "measured_path",
    "one_layer",
    "through",
    "write_cluster",
]
