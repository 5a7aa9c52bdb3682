"""The process groups of a rank: tensor parallel, KVP peers, both together, neighbours in the pipeline.

Each group is made by its own members only, and only where the degree is above 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from ...layout import Layout
from .shared import Shared

STORE_FD = "MNEMOC_STORE_FD"
"""Environment: rank 0 serves the rendezvous on this listening socket (set by the nursery)."""

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Comm:
    """What a schedule's step() talks through, named like the IR's axes.

    prev, next: global ranks of the pipeline neighbours; tp_kvp: all ranks of the stage (helix only)
    shared: memory that the ranks of tp read of one another, where the program has them do so
    """

    tp: dist.ProcessGroup | None
    tp_rank: int
    pp: dist.ProcessGroup | None
    prev: int | None
    next: int | None
    kvp: dist.ProcessGroup | None
    tp_kvp: dist.ProcessGroup | None
    shared: Shared | None = None


def connect(layout: Layout, rank: int, backend: str, token: str = "", *, beside: int = 0) -> Comm:
    """Join the world (torchrun's environment), if that is not done, and make this rank's groups.

    token: what this set of workers is called; its name in a store that outlives it
    beside: multiprocessors that kernels leave to NCCL's messages between KVP groups; 0: none run beside any
    """
    stage, group, tp_rank = layout.coordinates(rank)
    if layout.gpus > 1 and not dist.is_initialized():
        _join(layout, rank, backend, token)
    tp_ranks, groups = range(layout.tp), range(layout.kvp)
    stage_ranks = [layout.rank(stage, g, t) for g in groups for t in tp_ranks]
    return Comm(
        tp=_group("tp", [layout.rank(stage, group, t) for t in tp_ranks]),
        tp_rank=tp_rank,
        pp=_group("pp", [layout.rank(s, group, tp_rank) for s in range(layout.spp)]),
        prev=layout.rank(stage - 1, group, tp_rank) if stage > 0 else None,
        next=layout.rank(stage + 1, group, tp_rank) if stage + 1 < layout.spp else None,
        kvp=_group(
            "kvp",
            [layout.rank(stage, g, tp_rank) for g in groups],
            _quick(beside) if backend == "nccl" and beside else None,
        ),
        tp_kvp=_group("tp_kvp", stage_ranks) if layout.helix else None,
    )


def _join(layout: Layout, rank: int, backend: str, token: str) -> None:
    """The agents of torchrun keep one store for all the sets of workers that they start one after another.

    So each set writes under its own name, else it would read where ranks of an earlier one listened.
    """
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        layout.gpus,
        is_master=rank == 0 and not held,
        timeout=timedelta(minutes=2),
        wait_for_workers=False,
        master_listen_fd=int(os.environ[STORE_FD])
        if rank == 0 and STORE_FD in os.environ
        else None,
    )
    dist.init_process_group(
        backend,
        store=PrefixStore(token, store),
        rank=rank,
        world_size=layout.gpus,
        timeout=TIMEOUT,
    )


def _quick(places: int) -> Any:
    """Options by which messages go before what waits to be computed, in no more than so many places."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = places
    return options


def _group(axis: str, ranks: Iterable[int], options: Any = None) -> dist.ProcessGroup | None:
    members = list(ranks)
    if len(members) == 1:
        return None
    made = dist.new_group(
        members, use_local_synchronization=True, group_desc=axis, pg_options=options
    )
    assert isinstance(made, dist.ProcessGroup), f"this rank is not a member of its own {axis} group"
    return made
