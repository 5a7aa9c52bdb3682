"""Model, cluster and promise → plan: cost model, chunk schedule, program for HiGHS, explanation."""

from .cluster import CALIBRATED, Cluster, clusters, load_cluster, measured_path, write_cluster
from .cost import StageFormulas
from .plan import Made, make_plan

__all__ = [
    "CALIBRATED",
    "Cluster",
    "Made",
    "StageFormulas",
    "clusters",
    "load_cluster",
    "make_plan",
    "measured_path",
    "write_cluster",
]
