"""Memory that tp ranks read of one another: where it lies, and what happens where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mnemoc.runtime.rank.shared import addresses, share
from torch._C._distributed_c10d import HashStore


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def test_both_buffers_lie_on_every_rank_as_far_from_where_its_memory_starts() -> None:
    memory = torch.zeros(3, 100, dtype=torch.bfloat16)  # of three ranks, each mapped somewhere
    rows = memory[1, 20:].view(2, 5, 8)
    handle = SimpleNamespace(rank=1, buffer_ptrs=[own.data_ptr() for own in memory])
    first, second = addresses(rows, handle)
    assert first.tolist() == [own[20:].data_ptr() for own in memory]
    assert second.tolist() == [own[60:].data_ptr() for own in memory]
    assert (first[1], second[1]) == (rows[0].data_ptr(), rows[1].data_ptr())


def test_where_there_is_no_symmetric_memory_it_says_so_once_and_nccl_sums(
    alone: dist.ProcessGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert share(alone, (2, 4, 8), torch.bfloat16, torch.device("cpu")) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mnemoc: NCCL sums all, without symmetric memory: ")


def test_what_is_not_to_be_had_on_one_rank_is_used_on_none(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed import _symmetric_memory as symmetric

    rows = torch.zeros(2, 4, 8)
    handle = SimpleNamespace(rank=0, buffer_ptrs=[rows.data_ptr()], barrier=lambda: None)
    monkeypatch.setattr(symmetric, "empty", lambda *_, **__: rows)
    monkeypatch.setattr(symmetric, "rendezvous", lambda *_: handle)
    shared = share(alone, (2, 4, 8), rows.dtype, rows.device)
    assert shared is not None
    assert shared.rows is rows
    assert shared.held is handle
    monkeypatch.setattr(dist, "all_reduce", lambda had, *_: had.fill_(0))
    assert share(alone, (2, 4, 8), rows.dtype, rows.device) is None
    assert "on another rank" in capsys.readouterr().err
