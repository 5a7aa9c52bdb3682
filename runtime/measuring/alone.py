"""A rank by itself: what stands in for the other ranks, and for weights where there are none.

Peers. `LonePeers` is a process group in which nobody else is. To torch.distributed it is a backend like any
other, so a rank's emitted program runs as it stands, with the world's size and its own number in it. What
peers would send is random numbers, N(0, 1). As rows from the stage before they are what a norm expects; as
partial results of KVP peers they have small log-sum-exps, of keys that hardly weigh. A sum over ranks stays
this rank's part (where kernels read the peers' memory, that is zeros), and of what is gathered every piece is
its own. (torch's "fake" backend leaves in a tensor that is received whatever its memory held, infinities
too.)

Weights. Each product keeps the variance of its rows: N(0, 1/columns), of the columns that this rank holds,
as no other part is added to its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from ...artifact import Plan
from ...errors import BadInput
from ...layout import Layout
from ...units import format_bytes
from ..rank.comm import Comm, connect
from ..rank.shared import Shared, placed
from ..rank.surroundings import Surroundings

BACKEND = "mnemoc_alone"


class Supply:
    """What peers would send. It notes what it gave, so that the time for that can be told apart."""

    def __init__(self) -> None:
        self.given: list[tuple[torch.Size, torch.dtype]] = []
        self._numbers: dict[torch.dtype, list[torch.Tensor]] = {}  # a captured graph reads its own

    def fill(self, tensor: torch.Tensor) -> None:
        """Write numbers into a contiguous tensor that is to be received."""
        self.given.append((tensor.shape, tensor.dtype))
        ever, count = self._numbers.setdefault(tensor.dtype, []), tensor.numel()
        if not ever or ever[-1].shape[0] < count:
            more = torch.empty(count, dtype=tensor.dtype, device=tensor.device)
            generator = torch.Generator(tensor.device).manual_seed(count)
            ever.append(fill_normal(more, 1.0, generator))
        tensor.view(-1).copy_(ever[-1][:count])

    def fill_all(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self.fill(tensor)


class Arrived(dist.Work):
    """A message that is through. It holds its tensors, as one that is under way would.

    On a GPU, whoever waits has its stream wait for the one that the message was given on.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        on_gpu = tensors[0].is_cuda
        self.event = torch.cuda.current_stream().record_event() if on_gpu else None

    def wait(self, timeout: Any = None) -> bool:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        return True


class LonePeers(dist.ProcessGroup):
    """A process group of `size` ranks, of which only this one is there."""

    def __init__(self, rank: int, size: int, supply: Supply) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # it needs no store
        self.supply = supply

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return BACKEND

    # torch's stubs know the overloads of C++ too; from Python, only these forms are called
    def allreduce(  # type: ignore[override]
        self, tensors: list[torch.Tensor], *_: Any
    ) -> dist.Work:
        return Arrived(tensors)

    def allgather(  # type: ignore[override]
        self, pieces: list[list[torch.Tensor]], mine: list[torch.Tensor], *_: Any
    ) -> dist.Work:
        for received, own in zip(pieces, mine, strict=True):
            for piece in received:
                piece.copy_(own)
        return Arrived(mine)

    def send(self, tensors: list[torch.Tensor], *_: Any) -> dist.Work:
        return Arrived(tensors)

    def recv(self, tensors: list[torch.Tensor], *_: Any) -> dist.Work:
        for tensor in tensors:
            self.supply.fill(tensor)
        return Arrived(tensors)


def _lone_peers(options: Any, supply: Supply | None) -> LonePeers:
    """A group of the world shares the world's supply: only the world itself is given one."""
    if supply is None:
        world = dist.group.WORLD
        assert isinstance(world, LonePeers), "groups are made after their world"
        supply = world.supply
    return LonePeers(options.group_rank, options.group_size, supply)


dist.Backend.register_backend(BACKEND, _lone_peers, extended_api=True, devices=["cpu", "cuda"])


@dataclass(frozen=True)
class Alone(Surroundings):
    """The surroundings of a rank that is alone on its device.

    pages: KV pages of each layer, as many as are needed instead of all that the plan has
    step_bytes: what a micro-batch takes beside weights and KV pages, by the plan
    real: whether the weights are read, or random from `seed`; supply: what its peers send
    """

    pages: int
    step_bytes: int
    real: bool
    seed: int = 0
    supply: Supply = field(default_factory=Supply)

    def settle(self, device: torch.device) -> None:
        """All cores are its own."""

    def weights(self, program: Any, layout: Layout, device: torch.device) -> SimpleNamespace:
        self._refuse_if_too_large(program, device)
        if self.real:
            return super().weights(program, layout, device)
        return random_weights(program, device, self.seed)

    def num_pages(self, plan: Plan) -> int:
        return self.pages

    def connect(self, plan: Plan, program: Any, device: torch.device) -> Comm:
        if plan.gpus > 1:
            dist.init_process_group(
                BACKEND,
                store=HashStore(),
                rank=self.settings.rank,
                world_size=plan.gpus,
                pg_options=self.supply,
            )
        comm = connect(plan.layout, self.settings.rank, BACKEND)
        if not plan.one_shot_rows:
            return comm
        rows = torch.zeros(program.SHARED, dtype=getattr(torch, program.DTYPE), device=device)
        return replace(comm, shared=unshared(rows, plan.layout.tp, comm.tp_rank))

    def _refuse_if_too_large(self, program: Any, device: torch.device) -> None:
        weights, kv = parameter_bytes(program), kv_bytes(program, self.pages)
        free = free_bytes(device)
        needed = weights + kv + self.step_bytes
        if needed > free:
            raise BadInput(
                f"rank {self.settings.rank} needs {format_bytes(needed)} (weights "
                f"{format_bytes(weights)}, {self.pages:,} KV pages {format_bytes(kv)}, a step "
                f"{format_bytes(self.step_bytes)}), and {format_bytes(free)} are free",
                where=device,
                do="replay a shorter --prompt or fewer --decodes, or plan with a larger tp or spp",
            )


def unshared(rows: torch.Tensor, ranks: int, rank: int) -> Shared:
    """Memory that peers would read, and theirs: zeros, so that a sum stays this rank's part here, too."""
    peers = rows.new_zeros((ranks, *rows.shape))
    starts = [peer.data_ptr() for peer in peers]
    starts[rank] = rows.data_ptr()
    return Shared(rows, placed(starts, rows), lambda: None, peers)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def weight_bytes(weights: SimpleNamespace) -> int:
    """What a rank's loaded weights take."""
    owners = [weights, *weights.layers]
    tensors = (value for owner in owners for value in vars(owner).values())
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def parameter_bytes(program: Any) -> int:
    """What the parameters of a role will take on a rank."""
    return sum(
        math.prod(parameter["shape"])
        * getattr(torch, parameter["dtype"]).itemsize
        * (program.NUM_LAYERS if parameter["per_layer"] else 1)
        for parameter in program.PARAMETERS
    )


def kv_bytes(program: Any, pages: int) -> int:
    """What so many KV pages take in the layers of a role."""
    heads, _, page_size, dim = program.KV_SHAPE
    itemsize = getattr(torch, program.KV_DTYPE).itemsize
    return int(2 * program.NUM_LAYERS * heads * pages * page_size * dim * itemsize)


def random_weights(program: Any, device: torch.device, seed: int) -> SimpleNamespace:
    """Random weights in the form of `weights.load_weights`: the same from the same seed on one device."""
    generator = torch.Generator(device).manual_seed(seed)
    columns = {p["name"]: p["shape"][-1] for p in program.PARAMETERS}

    def make(parameter: Mapping[str, Any]) -> torch.Tensor:
        name, dtype = parameter["name"], getattr(torch, parameter["dtype"])
        tensor = torch.empty(parameter["shape"], dtype=dtype, device=device)
        if name.endswith("_scale"):  # of a weight in 8 bits, whose own numbers are N(0, 1)
            return tensor.fill_(columns[name.removesuffix("_scale")] ** -0.5)
        if tensor.dim() == 1:
            return tensor.fill_(1.0 if "norm" in name else 0.0)
        unit = name == "embedding" or dtype.itemsize == 1
        return fill_normal(tensor, 1.0 if unit else columns[name] ** -0.5, generator)

    weights = SimpleNamespace(layers=[SimpleNamespace() for _ in range(program.NUM_LAYERS)])
    for parameter in program.PARAMETERS:
        for owner in weights.layers if parameter["per_layer"] else [weights]:
            setattr(owner, parameter["name"], make(parameter))
    return weights


def fill_normal(tensor: torch.Tensor, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """N(0, deviation²) in place; types of 8 bits by way of float32, one slice after the other."""
    if tensor.dtype.itemsize > 1:
        return tensor.normal_(0.0, deviation, generator=generator)
    for part in tensor if tensor.dim() > 1 else [tensor]:
        exact = torch.empty(part.shape, dtype=torch.float32, device=tensor.device)
        part.copy_(exact.normal_(0.0, deviation, generator=generator))
    return tensor
