"""CUDA graphs of a stage's step: one for each shape of micro-batch that comes again.

A graph replays launches with the pointers and the host's numbers of its capture. So each shape has a batch of
its own, into which what comes is copied, and everything that the host decides by is part of the shape:
row counts, segments, peers, and, each up to the next power of two, the longest shard and the width of a page
table. Decode steps and chunks of planned sizes come again and again; what comes once is run as it is.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

from ...microbatch import Batch, Exchange, Second, Segments

MOST = 64
"""Graphs kept at a time; the one that was used longest ago goes first."""

T = TypeVar("T")
Result: TypeAlias = "torch.Tensor | None"
Step: TypeAlias = "Callable[..., Result]"
"""(batch, rows that arrived, if any) → rows or logits."""

Capture: TypeAlias = "Callable[[Callable[[], Result]], tuple[Callable[[], None], Result]]"
"""A call → what replays it, and where each replay leaves its result."""


@dataclass(frozen=True)
class _Graph:
    """A captured step. slots: the tensors that it reads, in the order of `_tensors`."""

    slots: list[torch.Tensor]
    replay: Callable[[], None]
    result: Result


class Graphs:
    """A step that is captured when a shape comes for the second time, and replayed from then on."""

    def __init__(self, step: Step, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._graphs: OrderedDict[object, _Graph | None] = OrderedDict()

    def __call__(self, batch: Batch, *arrived: torch.Tensor) -> Result:
        """The step's own result, in memory of its own."""
        shape = _shape(batch, arrived)
        known = shape in self._graphs
        graph = self._graphs.setdefault(shape, None)
        self._graphs.move_to_end(shape)
        if not known:
            if len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
            return self._step(batch, *arrived)
        if graph is None:
            graph = self._graphs[shape] = self._captured(batch, arrived)
        for slot, value in zip(graph.slots, _tensors(batch, arrived), strict=True):
            slot[tuple(map(slice, value.shape))].copy_(value)
        graph.replay()
        return None if graph.result is None else graph.result.clone()

    def _captured(self, batch: Batch, arrived: tuple[torch.Tensor, ...]) -> _Graph:
        own = dataclasses.replace(
            batch,
            **{name: getattr(batch, name).clone() for name in ("ids", "pos", "slots", "last")},
            decode=_roomy(batch.decode),
            prefill=_roomy(batch.prefill),
            exchange=_cloned(batch.exchange),
            second=_own(batch.second),
        )
        rows = tuple(value.clone() for value in arrived)
        replay, result = self._capture(lambda: self._step(own, *rows))
        return _Graph(_tensors(own, rows), replay, result)


def cuda_capture() -> Capture:
    """Graphs that share one pool of memory: they are replayed one after the other, results are copied out."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        return captured(run, pool)

    return capture


def captured(run: Callable[[], T], pool: Any = None) -> tuple[Callable[[], None], T]:
    """A call as a graph: what replays it, and what the call gave. pool: of memory that graphs share."""
    graph = torch.cuda.CUDAGraph()
    # Only this thread is bound by the rules of a capture: NCCL's own goes on asking for events.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


def warmed(run: Callable[[], object], times: int = 1) -> None:
    """Calls what is to be captured, on a stream aside: what it does but once is not to be in the graph."""
    stream: Any = torch.cuda.Stream  # untyped, as torch has it
    aside = stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(aside)


def _tensors(batch: Batch, arrived: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """All that a step reads of a micro-batch."""
    found = [batch.ids, batch.pos, batch.slots, batch.last]
    for part in _parts(batch):
        found += [part.rows, part.kv_len, part.past, part.pages] if part is not None else []
    for swap in _swaps(batch):
        found += [swap.sent, swap.received]
    return [*found, *arrived]


def _shape(batch: Batch, arrived: tuple[torch.Tensor, ...]) -> object:
    """Equal for micro-batches that one graph serves."""
    parts = [
        (part.count, part.max_rows, _room(part.max_kv), _room(part.pages.shape[1]))
        if part is not None
        else None
        for part in _parts(batch)
    ]
    swaps = [(swap.peer, len(swap.sent), len(swap.received)) for swap in _swaps(batch)]
    rows = batch.halves, len(batch.last), batch.num_decode, len(arrived)
    return (rows, *parts, *swaps)


def _parts(batch: Batch) -> tuple[Segments | None, ...]:
    second = () if batch.second is None else (batch.second.prefill,)
    return (batch.decode, batch.prefill, *second)


def _swaps(batch: Batch) -> tuple[Exchange, ...]:
    return batch.exchange + (() if batch.second is None else batch.second.exchange)


def _cloned(exchange: tuple[Exchange, ...]) -> tuple[Exchange, ...]:
    return tuple(
        dataclasses.replace(swap, sent=swap.sent.clone(), received=swap.received.clone())
        for swap in exchange
    )


def _own(second: Second | None) -> Second | None:
    """A second half of its own."""
    if second is None:
        return None
    prefill = _roomy(second.prefill)
    assert prefill is not None
    return dataclasses.replace(second, prefill=prefill, exchange=_cloned(second.exchange))


def _roomy(part: Segments | None) -> Segments | None:
    """Segments of its own, with room for longer shards."""
    if part is None:
        return None
    table = part.pages.new_zeros(part.count, _room(part.pages.shape[1]))
    table[:, : part.pages.shape[1]] = part.pages
    return dataclasses.replace(
        part,
        rows=part.rows.clone(),
        kv_len=part.kv_len.clone(),
        past=part.past.clone(),
        pages=table,
        max_kv=_room(part.max_kv),
    )


def _room(count: int) -> int:
    """The least power of two that is enough."""
    return 1 << max(0, count - 1).bit_length()
