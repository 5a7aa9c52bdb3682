"""The choice of a plan as a mixed-integer linear program, solved by HiGHS.

Sets     q ∈ Q   candidates: a layout (t, p, k) with KVP growth and stage split
         b ∈ B   context buckets
         c ∈ C   chunk sizes that candidate q may use in bucket b
Data     gpus_q      t·p·k
         rate_q      tokens/s in steady decode
         σ_qbc       seconds of bucket b's chunks at the pipeline's pace            (`outlook`)
         τ_qbc       seconds of the slowest of them in its slowest stage
         η_q         seconds that the last chunk's logits add
         a_qbc       bytes of what a step needs beside weights and KV; m_q those left on the fullest rank
Choose   z_q ∈ {0,1}      the candidate
         x_qbc ∈ {0,1}    the chunk size per bucket
         w_q ≥ 0          the slowest chunk: what filling and draining the pipeline costs per stage

minimise  gpus:        Σ_q gpus_q·z_q                 then TTFT
          ttft:        TTFT
          throughput: −Σ_q rate_q·z_q                 then TTFT
with      TTFT = Σ_qbc σ_qbc·x_qbc + Σ_q (p_q − 1)·w_q + Σ_q η_q·z_q

subject to
  one_plan           Σ_q z_q = 1
  one_chunk[q,b]     Σ_c x_qbc = z_q
  slowest[q,b]       Σ_c τ_qbc·x_qbc ≤ w_q
  least_slowest[q]   w_q ≥ ω_q·z_q                 a valid bound, to tighten the relaxation
  ttft               TTFT ≤ promise
  tbt[q,b]           Σ_c p_q·τ_qbc·x_qbc ≤ promise·z_q
  memory[q,b]        Σ_c a_qbc·x_qbc ≤ m_q·z_q
  devices            Σ_q gpus_q·z_q ≤ devices

The second objective is solved with the first held at its optimum (`first_objective`). Entries (q,b,c)
that no plan within `limits` can use are left out, and ω_q is the least slowest chunk of any such plan
(`candidate.useful` has the argument). Seconds are scaled so that the largest limit is 1000.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from .candidate import Candidate, useful

_GAP = 1e-6
_TIME_LIMIT_S = 30.0


@dataclass(frozen=True)
class Problem:
    """candidates with, for each, the TTFT above which it is of no use; and the promise."""

    objective: str
    candidates: tuple[Candidate, ...]
    limits: tuple[float, ...]
    ttft_s: float
    tbt_s: float
    usable_bytes: int
    devices: int


@dataclass(frozen=True)
class Solution:
    """The chosen candidate with a menu entry per bucket; objective and bound of the named objective."""

    candidate: Candidate
    choice: NDArray[np.int64]
    objective: float
    bound: float
    gap: float


def solve(problem: Problem) -> Solution | None:
    """The optimum, or None if no candidate keeps the promise."""
    model = _Model(problem)
    first = model.first_objective()
    found = model.run(model.ttft if first is None else first)
    if found is None:
        return None
    if first is not None:
        model.row("first_objective", -highspy.kHighsInf, found[0] + _slack(found[0]), first)
        second = model.run(model.ttft)
        assert second is not None, "the second objective has the first one's plan at least"
    candidate, choice = model.decode()
    sign = -1.0 if problem.objective == "throughput" else 1.0
    unit = 1.0 / model.scale if first is None else 1.0
    objective, bound = (sign * unit * value for value in found)
    gap = abs(objective - bound) / max(abs(objective), 1e-12)
    return Solution(candidate, choice, objective, bound, gap)


def _slack(value: float) -> float:
    return 1e-9 * abs(value)


class _Model:
    """The program in HiGHS: columns are made first, then the named rows."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.scale = 1000.0 / max(problem.limits)
        self.highs = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in (
            ("output_flag", False),
            ("threads", 1),
            ("mip_rel_gap", _GAP),
            ("time_limit", _TIME_LIMIT_S),
        ):
            self.highs.setOptionValue(option, value)
        self.ttft: dict[int, float] = {}
        self.z: list[int] = []
        self.x: list[list[tuple[int, NDArray[np.int64]]]] = []
        for q in range(len(problem.candidates)):
            self._add(q)
        self.row("one_plan", 1, 1, dict.fromkeys(self.z, 1.0))
        self.row("ttft", 0, problem.ttft_s * self.scale, self.ttft)
        gpus = {z: float(c.outlook.gpus) for z, c in zip(self.z, problem.candidates, strict=True)}
        self.row("devices", 0, problem.devices, gpus)

    def _add(self, q: int) -> None:
        candidate, limit = self.problem.candidates[q], self.problem.limits[q]
        z = self._column(f"z[{q}]", integer=True)
        w = self._column(f"w[{q}]", integer=False)
        p, room = candidate.stages, self.problem.usable_bytes - candidate.fixed_bytes
        self.z.append(z)
        self.ttft[z] = candidate.outlook.head_s * self.scale
        if p > 1:
            self.ttft[w] = p - 1.0
        buckets = []
        kept = useful(candidate, limit)
        assert kept is not None, "a candidate that breaks its limit was not left out"
        least = kept.least_slowest_s * self.scale
        self.row(f"least_slowest[{q}]", 0, highspy.kHighsInf, {w: 1.0, z: -least})
        for b, entries in enumerate(kept.entries):
            first = [self._column(f"x[{q},{b},{c}]", integer=True) for c in entries]
            sigma = candidate.cost_s[b, entries] * self.scale
            tau = candidate.tau_s[b, entries] * self.scale
            bytes_ = candidate.outlook.step_bytes[b, entries]
            self.ttft.update(zip(first, sigma, strict=True))
            ones = dict.fromkeys(first, 1.0)
            times = dict(zip(first, tau, strict=True))
            cross = {column: p * time for column, time in times.items()}
            sizes = dict(zip(first, bytes_ / self.problem.usable_bytes, strict=True))
            self.row(f"one_chunk[{q},{b}]", 0, 0, {**ones, z: -1.0})
            self.row(f"slowest[{q},{b}]", -highspy.kHighsInf, 0, {**times, w: -1.0})
            promise = self.problem.tbt_s * self.scale
            self.row(f"tbt[{q},{b}]", -highspy.kHighsInf, 0, {**cross, z: -promise})
            share = room / self.problem.usable_bytes
            self.row(f"memory[{q},{b}]", -highspy.kHighsInf, 0, {**sizes, z: -share})
            buckets.append((first[0] if first else -1, entries))
        self.x.append(buckets)

    def first_objective(self) -> dict[int, float] | None:
        """The named objective, where it is not TTFT itself."""
        pairs = list(zip(self.z, self.problem.candidates, strict=True))
        if self.problem.objective == "gpus":
            return {z: float(c.outlook.gpus) for z, c in pairs}
        if self.problem.objective == "throughput":
            return {z: -c.outlook.growth.concurrency / c.outlook.decode_s for z, c in pairs}
        return None

    def run(self, objective: dict[int, float]) -> tuple[float, float] | None:
        """Minimise; the objective reached and its proven bound, or None if infeasible."""
        count = self.highs.getNumCol()
        costs = np.zeros(count)
        costs[list(objective)] = list(objective.values())
        self.highs.changeColsCost(count, np.arange(count, dtype=np.int32), costs)
        self.highs.run()
        status = self.highs.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        info = self.highs.getInfo()
        solved = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        assert solved, f"HiGHS stopped without a plan: {self.highs.modelStatusToString(status)}"
        return float(info.objective_function_value), float(info.mip_dual_bound)

    def decode(self) -> tuple[Candidate, NDArray[np.int64]]:
        """The chosen candidate and the menu entry of each bucket."""
        values = np.array(self.highs.getSolution().col_value)
        q = int(np.argmax(values[self.z]))
        picked = [
            entries[int(np.argmax(values[first : first + len(entries)]))]
            for first, entries in self.x[q]
        ]
        return self.problem.candidates[q], np.array(picked, dtype=np.int64)

    def row(self, name: str, low: float, high: float, terms: dict[int, float]) -> None:
        columns = np.fromiter(terms, dtype=np.int32)
        values = np.fromiter(terms.values(), dtype=np.float64)
        self.highs.addRow(low, high, len(columns), columns, values)
        self.highs.passRowName(self.highs.getNumRow() - 1, name)

    def _column(self, name: str, *, integer: bool) -> int:
        self.highs.addCol(0.0, 0.0, 1.0 if integer else highspy.kHighsInf, 0, [], [])
        column = int(self.highs.getNumCol()) - 1
        if integer:
            self.highs.changeColIntegrality(column, highspy.HighsVarType.kInteger)
        self.highs.passColName(column, name)
        return column
