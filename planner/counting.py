"""Counts what one rank does in each function of a module, work by work, as rows of coefficients.

Where a layer may go in two halves (`passes.overlap`), each half's exchange runs beside what lies between
it, or the end of the one before, and its merge: all but sums over KVP ranks, which need the same link.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import sympy

from ..ir.graph import Function, Module
from ..ir.ops import Work, works
from ..ir.sizes import KD, QK, SYMBOLS, Size, X, any_of

HALVES = "halves"
"""The block of a layer in two halves, where there is one."""

FUNCTIONS = {
    "embed": "embed",
    "rotation": "entry",
    "layer_entry": "entry",
    "layer": "layer",
    "layer_halves": HALVES,
    "head": "head",
}
"""Function of the module → block. A stage's last layer counts as any other: it stores a norm's rows less."""

Row = tuple[float, ...]
"""Coefficients of an affine size or time: of 1, of each symbol, and of `any_of` those that gate."""

BASIS: tuple[sympy.Expr, ...] = (sympy.S.One, *SYMBOLS, any_of(QK), any_of(KD), any_of(X))


@dataclass(frozen=True)
class Task:
    """One work of one op, counted; `launches`: kernel launches that it stands for.

    beside: number of the transfer that it runs beside, or is itself (`transfers`), from 1 on; 0: none
    """

    part: str
    resource: str
    axis: str | None
    flops: Row
    bytes: Row
    grain: Row
    launches: int
    beside: int = 0
    transfers: bool = False


def count(module: Module) -> Mapping[str, tuple[Task, ...]]:
    """What one rank does in each function of a sharded, fused module, and in a hop."""
    mesh = module.mesh
    tasks: dict[str, tuple[Task, ...]] = defaultdict(tuple)
    for name, block in FUNCTIONS.items():
        if name in module.functions:
            function = module.functions[name]
            done = [list(_tasks(works(op, function, mesh))) for op in function.ops]
            _put_beside(function, done)
            tasks[block] += tuple(task for op_tasks in done for task in op_tasks)
    hidden = module.functions["embed"].result_types[0].local_bytes(mesh)
    tasks["hop"] = tuple(_tasks((Work("communication", "hop", 0, hidden, "spp"),)))
    return dict(tasks)


def _put_beside(function: Function, done: list[list[Task]]) -> None:
    """Find what runs beside each transfer that is not waited for at once."""
    sent: list[int] = []  # ops whose transfers are under way, in their order
    since = number = 0
    for at, op in enumerate(function.ops):
        if op.name.startswith("exchange"):
            since = since if sent else at + 1
            sent.append(at)
        elif op.name in ("merge", "merge_scatter") and sent:
            number += 1
            (transfer,) = done[first := sent.pop(0)]
            done[first] = [replace(transfer, beside=number, transfers=True)]
            for op_tasks in done[since:at]:
                op_tasks[:] = [
                    task if task.transfers or _crosses_kvp(task) else replace(task, beside=number)
                    for task in op_tasks
                ]
            since = at


def _crosses_kvp(task: Task) -> bool:
    return task.axis is not None and "kvp" in task.axis


def _tasks(op_works: tuple[Work, ...]) -> Iterator[Task]:
    """The works of one op; the first that is no collective stands for the op's launch."""
    launches = 1
    for work in op_works:
        launched = launches if work.axis is None else 0
        launches -= launched
        flops, moved, grain = (row_of(size) for size in (work.flops, work.bytes, work.grain))
        yield Task(work.part, work.resource, work.axis, flops, moved, grain, launched)


def row_of(size: Size) -> Row:
    if isinstance(size, int):
        return (float(size),) + (0.0,) * (len(BASIS) - 1)
    terms = sympy.expand(size).as_coefficients_dict()
    row = tuple(float(terms.get(key, 0)) for key in BASIS)
    assert sum(value != 0 for value in row) == len(terms), f"{size} is not affine"
    return row


def sum_rows(*weighed: tuple[float, Row]) -> Row:
    """Σ weight·row."""
    return tuple(sum(w * row[i] for w, row in weighed) for i in range(len(BASIS)))
