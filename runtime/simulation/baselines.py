"""Other engines' ways to fill a micro-batch, for comparison: the rest of the engine stays as it is.

`whole-prefill`: a prompt, once begun, has all devices to itself until its last token is through, first come,
first served; decodes wait meanwhile. So do engines that prefill by context parallelism without chunks. Its
rows go out in the plan's chunks even so: nothing comes between them, and all stages are busy, as all devices
of such an engine are. One pass over the whole prompt would idle all stages but one, and count against it what
is not its weakness.

`fixed-chunk`: so many tokens per step whatever the context, decodes first, then prompts, first come, first
served; as vLLM does. BUDGET is its default on an A100.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from ...artifact import Plan
from ..scheduling.cost import Load
from ..scheduling.growth import Growth
from ..scheduling.job import Job
from ..scheduling.packing import Packed, chunk_loads

BUDGET = 2048


@dataclass(eq=False)
class WholePrefill:
    plan: Plan
    growth: Growth
    alone: bool = True
    apart: bool = False
    _begun: Job | None = field(default=None, init=False)

    def pack(
        self,
        prompts: Sequence[Job],
        decodes: Sequence[Job],
        loads: dict[int, Load],
        groups: Set[int],
        now_s: float,
    ) -> list[Packed]:
        if self._begun not in prompts:
            self._begun = prompts[0] if prompts else None
        job = self._begun
        if job is None:
            return []
        rows = min(self.plan.chunk_at(job.issued), job.prompt - job.issued)
        return [_add(self.growth, job, rows, loads)]


@dataclass(eq=False)
class FixedChunk:
    plan: Plan
    growth: Growth
    budget: int = BUDGET
    alone: bool = False
    apart: bool = False

    def pack(
        self,
        prompts: Sequence[Job],
        decodes: Sequence[Job],
        loads: dict[int, Load],
        groups: Set[int],
        now_s: float,
    ) -> list[Packed]:
        packed = []
        left = min(self.budget, self.plan.max_rows) - len(decodes)
        for job in prompts:
            if left <= 0:
                break
            rows = min(left, job.prompt - job.issued)
            packed.append(_add(self.growth, job, rows, loads))
            left -= rows
        return packed


def _add(growth: Growth, job: Job, rows: int, loads: dict[int, Load]) -> Packed:
    """The chunk, which is added to the loads of its groups."""
    ends = job.issued + rows == job.prompt
    for group, load in chunk_loads(growth, job, rows, ends).items():
        loads[group] = loads[group] + load if group in loads else load
    return Packed(job, rows)
