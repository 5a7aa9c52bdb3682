"""The files that start a plan elsewhere: torchrun on hosts, Slurm, Kubernetes, and an image for containers.

They are part of the artifact, so they are the same for the same plan; what differs between sites (addresses,
the weights' folder, the secret) comes from the environment. Tensor parallel groups never span two nodes: each
runs the most ranks that are whole groups.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..artifact import Plan, Workload
from .templating import render

HTTP_PORT, RENDEZVOUS_PORT, CONTROL_PORT = 8000, 29500, 29600
FILES = (
    "torchrun.sh",
    "slurm.sbatch",
    "kubernetes.yaml",
    "Dockerfile",
    "README.md",
)
LONGEST_NAME = 40
"""Of Kubernetes' 63 characters: controllers append to a name."""
MARGIN_S = 30


@dataclass(frozen=True)
class Launch:
    """What is to be started. devices_per_node, rdma: of the cluster that it was planned for

    rdma: whether the nodes' network is one that NCCL uses past the kernel
    """

    model: str
    workload: Workload
    plan: Plan
    devices_per_node: int
    rdma: bool

    @property
    def name(self) -> str:
        """As Kubernetes and Slurm let things be called."""
        plain = re.sub("[^a-z0-9]+", "-", self.model.lower()).strip("-")
        return f"mnemoc-{plain}"[:LONGEST_NAME].rstrip("-")

    @property
    def cuda(self) -> bool:
        return self.plan.target.startswith("cuda")

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many run on each node: all have as many but the last, which has what is left."""
        tp = self.plan.layout.tp
        most = self.devices_per_node // tp * tp
        nodes = math.ceil(self.plan.gpus / most)
        return (most,) * (nodes - 1) + (self.plan.gpus - most * (nodes - 1),)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The first and the last rank of each node."""
        firsts = [sum(self.ranks[:node]) for node in range(len(self.ranks))]
        return [(first, first + n - 1) for first, n in zip(firsts, self.ranks, strict=True)]

    @property
    def memory_mib(self) -> int:
        """Of a node's ranks, where they compute in the node's own memory."""
        return math.ceil(self.plan.memory.used_bytes * self.ranks[0] / 2**20)

    @property
    def drain_s(self) -> int:
        """What the longest request that was promised takes: it may end when the server is told to."""
        asked = self.workload
        return math.ceil(asked.ttft_s + asked.output_tokens * asked.tbt_s)

    @property
    def grace_s(self) -> int:
        """After which a server is killed that was told to end."""
        return self.drain_s + MARGIN_S


def render_launch(job: Launch) -> dict[str, bytes]:
    """The files of launch/, by their path in the artifact."""
    ports = {"http": HTTP_PORT, "rendezvous": RENDEZVOUS_PORT, "control": CONTROL_PORT}
    title = f"{job.model} for {job.workload.context:,} tokens of context: {job.plan.layout}"
    return {
        f"launch/{name}": render(f"launch/{name}.j2", job=job, ports=ports, title=title).encode()
        for name in FILES
    }
