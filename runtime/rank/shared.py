"""Memory of a tensor-parallel group's ranks that all of them read: torch's symmetric memory.

Partial sums of few rows are written there, and each rank's kernel adds up what lies in all of them (the
artifact's `kernels/all_reduce.py`). Devices must reach one another's memory, as in a node with a switch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shared:
    """What a schedule's sums over tp are read from.

    rows: [2, rows, columns], this rank's two buffers
    addresses: of each buffer, int64 [ranks] on the device: where all ranks' lie, as this one sees them
    meet: launches a wait for all ranks to come as far: what they wrote before can be read behind it
    held: what the addresses lead to, for as long as they are used
    """

    rows: torch.Tensor
    addresses: tuple[torch.Tensor, torch.Tensor]
    meet: Callable[[], None]
    held: object


def share(
    group: dist.ProcessGroup, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Shared | None:
    """Buffers of that shape on all ranks of a group; None, and a line on stderr, where there can be none."""
    import torch.distributed._symmetric_memory as symmetric  # only here: CPUs do without

    rows, handle, reason = None, None, "it is not to be had on another rank"
    try:
        rows = symmetric.empty(shape, dtype=dtype, device=device)
        handle = symmetric.rendezvous(rows, group)
    except RuntimeError as error:  # what the driver, the container or the link does not allow
        reason = str(error).splitlines()[0]
    had = torch.tensor(int(handle is not None), device=device)
    dist.all_reduce(
        had, dist.ReduceOp.MIN, group
    )  # one that has it alone would wait for the others for ever
    if not had.item():
        if dist.get_rank(group) == 0:
            print(f"mnemoc: NCCL sums all, without symmetric memory: {reason}", file=sys.stderr)
        return None
    assert rows is not None and handle is not None
    return Shared(rows, addresses(rows, handle), handle.barrier, handle)


def addresses(rows: torch.Tensor, handle: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each buffer lies on each rank: as far behind the start of its memory as on this one."""
    behind = rows.data_ptr() - handle.buffer_ptrs[handle.rank]
    return placed([start + behind for start in handle.buffer_ptrs], rows)


def placed(starts: list[int], rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The addresses of both buffers, of which the first lies at `starts`, laid out as `rows` are."""
    starts_R = torch.tensor(starts, dtype=torch.int64, device=rows.device)
    return starts_R, starts_R + rows[0].nbytes
