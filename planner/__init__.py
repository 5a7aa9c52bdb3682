"""Model, cluster and promise → plan: cost model, chunk schedule, program for HiGHS, explanation."""

from .cluster import CALIBRATED, Cluster, clusters, load_cluster, measured_path, write_cluster
from .plan import Made, make_plan
from .timeline import make_timeline

__all__ = [
    "CALIBRATED",
    "Cluster",
    "Made",
    "clusters",
    "load_cluster",
    "make_plan",
    "make_timeline",
    "measured_path",
    "write_cluster",
]
