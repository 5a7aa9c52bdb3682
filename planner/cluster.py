"""What is known of a cluster: figures with their sources, efficiencies as curves, measured kernels.

What is unknown is an error, never an invented number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..codec import to_json
from ..errors import BadInput
from ..speeds import KernelSpeeds
from ..tiles import MeasuredTiles
from .curves import Curve

CALIBRATED = "measured by mnemoc calibrate on this machine"
"""The source of a figure that was measured on the machine itself."""

TEXTS = ("name", "device", "target")
TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cpu")


@dataclass(frozen=True)
class Quantity:
    """A number in base units, and where it comes from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes of equal devices.

    origin: the file it was read from, for errors and notes
    numbers: every single figure by its dotted key; curves: every efficiency that grows, by its name
    kernels: measured speeds of kernels, by op and provider, where anybody measured them
    tiles: what our own kernels are cut by, where anybody measured that
    """

    name: str
    device: str
    target: str
    origin: str
    numbers: Mapping[str, Quantity]
    curves: Mapping[str, Curve]
    kernels: KernelSpeeds = field(default_factory=dict)
    tiles: MeasuredTiles | None = None

    def __getitem__(self, key: str) -> float:
        """A figure in base units; BadInput if the file does not know it."""
        if key not in self.numbers:
            raise BadInput(
                f"{key} of this cluster is not known",
                where=self.origin,
                do=f"add `{key} = {{ value = ..., unit = ..., source = ... }}`",
            )
        return self.numbers[key].value

    def curve(self, name: str) -> Curve:
        """An efficiency that grows; BadInput if the file does not know it."""
        if name not in self.curves:
            raise BadInput(
                f"efficiency.{name} of this cluster is not known",
                where=self.origin,
                do=f"add `efficiency.{name} = {{ points = ..., unit = ..., source = ... }}`",
            )
        return self.curves[name]

    @property
    def nodes(self) -> int:
        return round(self["nodes"])

    @property
    def devices_per_node(self) -> int:
        return round(self["devices_per_node"])

    @property
    def switched(self) -> int:
        """Devices behind one switch, by which each reads any other's memory over all of its links; or 0."""
        return round(self["links.intra.switched"]) if "links.intra.switched" in self.numbers else 0

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def describe(self) -> dict[str, Any]:
        """As plain data, for manifests. Where the file lay on this machine is left out."""
        numbers = {key: dataclasses.asdict(q) for key, q in self.numbers.items()}
        curves = {name: dataclasses.asdict(curve) for name, curve in self.curves.items()}
        texts = {key: getattr(self, key) for key in TEXTS}
        kernels = {
            op: {name: dataclasses.asdict(measured) for name, measured in table.items()}
            for op, table in self.kernels.items()
        }
        more: dict[str, Any] = {"kernels": kernels} if kernels else {}
        if self.tiles is not None:
            more["tiles"] = to_json(self.tiles)
        return texts | {"numbers": numbers, "curves": curves} | more

    @property
    def usable_bytes(self) -> int:
        """Memory that a plan may fill on one device."""
        return int(self["memory.capacity"] - self["memory.reserve"])

    @property
    def host_bytes(self) -> int:
        """What a device may keep of its node's own memory; 0 where nothing is said of that."""
        if "host.memory" not in self.numbers:
            return 0
        return int(self["host.memory"] * self["host.share"] / self.devices_per_node)

    @property
    def communicator_bytes(self) -> int:
        """What NCCL allocates for one process group; gloo, on CPUs, has no buffers of such a size."""
        return 0 if self.target == "cpu" else int(self["memory.communicator"])
