"""Which precisions a cluster has, and what a figure of one of them rests on."""

from __future__ import annotations

from collections.abc import Iterator

from ..artifact import FP8, PRECISIONS, Precision
from ..errors import BadInput, UsageError
from .cluster import Cluster
from .cluster_files import clusters, load_cluster

PEAK = "peak.float8"


def check_precision(cluster: Cluster, precision: Precision) -> Precision:
    """The precision itself, if the cluster has it.

    An A100 has no 8-bit floats. Engines unpack weights and keys there (vLLM by Marlin kernels); what that
    reaches has no figure here. So fp8 is refused where the cluster has no peak.float8, and not guessed.
    """
    for name, value in (("weights", precision.weights), ("kv_cache", precision.kv_cache)):
        if value not in PRECISIONS:
            raise UsageError(
                f"unknown precision of {name}", got=value, do=f"one of {', '.join(PRECISIONS)}"
            )
    if precision.fp8 and cluster.target == "cpu":
        raise BadInput(
            "fp8 is not for CPUs: their kernels compute in float32",
            where=cluster.name,
            do="leave fp8 out, or plan for GPUs",
        )
    if not precision.fp8 or PEAK in cluster.numbers:
        return precision
    able = ", ".join(name for name in clusters() if PEAK in load_cluster(name).numbers)
    raise BadInput(
        f"no fp8 on {cluster.device}: its cluster file gives no {PEAK}",
        where=cluster.name,
        do=f"leave fp8 out, or plan for one of {able}",
    )


def precision_notes(cluster: Cluster, precision: Precision) -> Iterator[str]:
    """What fp8 figures rest on."""
    if precision.weights == FP8:
        curve = cluster.curve("matmul_fp8")
        yield (
            f"fp8 products (W8A8) at up to {curve.full:.0%} of their peak; {curve.source}. Rows are "
            "quantised per token as norm and SwiGLU store them, and in a pass of its own after attention."
        )
    if precision.kv_cache == FP8:
        yield (
            "fp8 KV cache: a byte per element, unpacked for attention in 16 bits; that this costs nothing "
            "beside the reading is assumed."
        )
