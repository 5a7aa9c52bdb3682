"""What a rank finds around it: cores, weights, room for KV pages, and the other ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from ...artifact import LENT, Plan
from ...layout import Layout
from . import cores
from .comm import Comm, connect
from .settings import Settings
from .shared import share
from .weights import Checkpoint, load_weights


@dataclass(frozen=True)
class Surroundings:
    """Those of a rank among all others of its plan; `alone.Alone` has those of one by itself."""

    settings: Settings

    def settle(self, device: torch.device) -> None:
        """Keep to cores of one's own, where the ranks share a CPU."""
        at = self.settings
        if device.type == "cpu":
            cores.settle(at.local_rank, at.local_world, at.threads)

    def weights(self, program: Any, layout: Layout, device: torch.device) -> SimpleNamespace:
        """What the rank holds of the model, as its program says (see `weights.load_weights`)."""
        return load_weights(
            Checkpoint.open(self.settings.weights),
            program.PARAMETERS,
            program.FIRST_LAYER,
            program.NUM_LAYERS,
            {axis: layout.along(axis, self.settings.rank) for axis in ("tp", "tp_kvp")},
            device,
        )

    def num_pages(self, plan: Plan) -> int:
        """KV pages of each layer."""
        return plan.num_pages

    def connect(self, plan: Plan, program: Any, device: torch.device) -> Comm:
        """The process groups that the rank's program talks through, and memory that it shares."""
        rank, token = self.settings.rank, self.settings.token or ""
        if device.type == "cpu":
            with cores.giving_way():
                return connect(plan.layout, rank, "gloo", token)
        places = torch.cuda.get_device_properties(device).multi_processor_count // LENT
        beside = places if plan.overlap_rows else 0
        comm = connect(plan.layout, rank, "nccl", token, beside=beside)
        if not plan.one_shot_rows:
            return comm
        assert comm.tp is not None, "alone a rank has nothing to sum"
        dtype = getattr(torch, program.DTYPE)
        return replace(comm, shared=share(comm.tp, program.SHARED, dtype, device))
