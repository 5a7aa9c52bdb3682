"""Why no plan keeps a promise: the constraint that forbids it, and what near by can be kept.

The nearest promise relaxes TTFT or TBT alone, or both where neither alone is enough. The nearest cluster
has the fewest nodes of the same kind that would do; it is looked for up to `_REACH` times the devices,
or `_FAR` of them.

**A bound for any number of devices.** With ever more KVP groups a group's share of the KV cache shrinks
to a page, and nothing else gets cheaper. So the bounds of a layout of as many groups as pages hold for its
(t, p) whatever k; p is at most the layers, t at most a node. Helix does get cheaper with k, but k then
divides the heads: each is priced as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from ..alternatives import Frontier, Relaxation
from ..errors import Infeasible
from ..layout import Layout
from ..units import format_bytes, format_duration
from .candidate import Candidate, best_chunks
from .outlook import NEVER
from .search import Finding, Promise, Search, balanced_bytes
from .space import AXES, ffn_fits, page_size, tensor_degrees
from .what_if import Answer, WhatIf
from .workload import total_tokens

_REACH = 16
_FAR = 2048


def infeasible(question: WhatIf, frontier: Frontier | None = None) -> Infeasible:
    """Which constraint no plan keeps, with the nearest promise and the nearest cluster that can be kept."""
    what, binding, relaxations = _reason(question)
    cluster, none = _nearest_cluster(question, binding)
    nearest = [*relaxations, *([cluster] if cluster else [])]
    options = [_sentence(question, relaxation) for relaxation in nearest]
    do = f"feasible with {' or '.join(options)}" if options else _NOTHING
    if none:
        do += f"; {none}"
    return Infeasible(what, binding=binding, do=do, nearest=tuple(nearest), frontier=frontier)


_NOTHING = "no relaxation of one figure alone makes it feasible: shorten the context"


def _reason(question: WhatIf) -> tuple[str, str, list[Relaxation]]:
    """What cannot be kept, its name, and promises that can."""
    search, promise = question.search, question.promise
    devices = promise.devices
    quick = search.outlooks(devices, promise.tbt_s)
    fast = search.fastest(quick, promise.tbt_s, NEVER)
    if fast is None:
        space = search.outlooks(devices)
        if not any(search.fits(o) for o in space):
            least = min(balanced_bytes(o) for o in space)
            usable = question.cluster.usable_bytes
            return (
                f"memory: weights, KV cache and one step need {format_bytes(least)} on the fullest "
                f"device, {format_bytes(usable)} are usable on {devices} devices",
                "memory",
                [],
            )
        return (
            f"tbt: no layout on {devices} devices keeps TBT {format_duration(promise.tbt_s)} "
            f"at this context",
            "tbt",
            list(_laxer_tbt(question)),
        )
    tbt_s = _least_tbt(search, promise, promise.ttft_s)
    relaxations = [_relaxation(question, ("ttft",), fast, _up(fast.ttft_s), promise.tbt_s)]
    if tbt_s < NEVER:
        keeps = _keeping(search, devices, tbt_s, promise.ttft_s)
        assert keeps is not None, "the least TBT that keeps TTFT keeps it"
        relaxations.append(_relaxation(question, ("tbt",), keeps, promise.ttft_s, _up(tbt_s)))
    return (
        f"ttft: the best TTFT on {devices} devices is {format_duration(fast.ttft_s)} with TBT "
        f"{format_duration(promise.tbt_s)}, promised {format_duration(promise.ttft_s)}",
        "ttft",
        relaxations,
    )


def _relaxation(
    question: WhatIf,
    relaxed: tuple[str, ...],
    plan: Finding | Answer,
    ttft_s: float,
    tbt_s: float,
) -> Relaxation:
    layout = plan.layout if isinstance(plan, Answer) else plan.outlook.layout
    nodes = math.ceil(layout.gpus / question.cluster.devices_per_node)
    return Relaxation(relaxed, layout, nodes, layout.gpus, ttft_s, tbt_s)


def _sentence(question: WhatIf, near: Relaxation) -> str:
    times = {"ttft": f"TTFT {format_duration(near.ttft_s)}"}
    times["tbt"] = f"TBT {format_duration(near.tbt_s)}"
    parts = [times[name] for name in near.relaxed if name in times]
    if "nodes" in near.relaxed:
        nodes = f"{near.nodes} node{'s' if near.nodes > 1 else ''} of {question.cluster.name}"
        parts.insert(0, f"{near.gpus} devices ({near.layout}), {nodes}")
        return " and ".join(parts)
    return f"{' and '.join(parts)} ({near.layout})"


def _up(seconds: float) -> float:
    """A duration rounded up to the digits that are printed: what is read must be feasible."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    step = 60.0 if seconds >= 3600 else 1.0 if seconds >= 600 else step
    return float(f"{math.ceil(seconds / step * (1 - 1e-12)) * step:.12g}")


# ------------------------------------------------------------------------------- the nearest promise


def _laxer_tbt(question: WhatIf) -> Iterator[Relaxation]:
    """The least TBT that some plan keeps, with the TTFT that goes with it where that is laxer too."""
    search, promise = question.search, question.promise
    for ttft_s, relaxed in ((promise.ttft_s, ("tbt",)), (NEVER, ("tbt", "ttft"))):
        tbt_s = _least_tbt(search, promise, ttft_s)
        fast = _keeping(search, promise.devices, tbt_s, ttft_s) if tbt_s < NEVER else None
        if fast is not None:
            kept_s = promise.ttft_s if relaxed == ("tbt",) else _up(fast.ttft_s)
            yield _relaxation(question, relaxed, fast, kept_s, _up(tbt_s))
            return


def _keeping(search: Search, devices: int, tbt_s: float, ttft_s: float) -> Finding | None:
    """The fastest that keeps a TBT which some plan just keeps, and a TTFT."""
    tbt_s *= 1 + 1e-9
    return search.fastest(search.outlooks(devices, tbt_s, ttft_s), tbt_s, ttft_s)


def _least_tbt(search: Search, promise: Promise, ttft_s: float) -> float:
    """The smallest TBT promise with which some plan keeps a TTFT promise."""
    least = NEVER
    space = search.outlooks(promise.devices, ttft_s=ttft_s)
    for outlook in sorted(space, key=lambda o: o.decode_s):
        if outlook.decode_s >= least:
            break
        if not search.within(outlook, NEVER, ttft_s):
            continue
        for split in outlook.splits():
            candidate = search.candidate(outlook, split, NEVER)
            least = max(outlook.decode_s, _least_cap(candidate, ttft_s, least))
    return least


def _least_cap(candidate: Candidate, ttft_s: float, below: float) -> float:
    """The smallest cap on p·τ, if below `below`, with which the best chunks keep the TTFT promise."""
    crossing = candidate.stages * candidate.tau_s
    caps = np.unique(crossing[candidate.allowed & (crossing < below)])

    def keeps(cap: float) -> bool:
        allowed = candidate.allowed & (crossing <= cap)
        best = best_chunks(dataclasses.replace(candidate, allowed=allowed))
        return best is not None and best[0] <= ttft_s

    if not len(caps) or not keeps(caps[-1]):
        return below
    low, high = 0, len(caps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(caps[middle]) else (middle + 1, high)
    return float(caps[low])


# ------------------------------------------------------------------------------- the nearest cluster


def _nearest_cluster(question: WhatIf, binding: str) -> tuple[Relaxation | None, str | None]:
    """The fewest devices that would do; failing that, a sentence that says how far was looked."""
    if question.degrees.keys() >= set(AXES):
        return None, None
    promise, name = question.promise, question.cluster.name
    bound_ttft_s, bound_tbt_s = _bounds(question)
    for what, least_s, asked_s in (
        ("TTFT", bound_ttft_s, promise.ttft_s),
        ("TBT", bound_tbt_s, promise.tbt_s),
    ):
        if least_s > asked_s:
            none = f"no number of nodes of {name} would do: {what} stays above {_below(least_s)}"
            return _more_memory(question) if binding == "memory" else None, none
    devices = promise.devices
    for devices in _ever_more(promise.devices):
        answer = question.solve(gpus=devices, objective="gpus")
        if answer is not None:
            times = (promise.ttft_s, promise.tbt_s)
            return _relaxation(question, ("nodes",), answer, *times), None
    nodes = devices // question.cluster.devices_per_node
    none = (
        f"up to {max(1, nodes):,} nodes of {name} none would do "
        f"(bounds for any number: TTFT {_below(bound_ttft_s)}, TBT {_below(bound_tbt_s)})"
    )
    return _more_memory(question) if binding == "memory" else None, none


def _more_memory(question: WhatIf) -> Relaxation | None:
    """The fewest devices that hold weights and KV, with the times that they then keep."""
    for devices in _ever_more(question.promise.devices):
        answer = question.solve(ttft_s=NEVER, tbt_s=NEVER, gpus=devices, objective="gpus")
        if answer is not None:
            times = (_up(answer.ttft_s), _up(answer.kept_tbt_s))
            return _relaxation(question, ("nodes", "ttft", "tbt"), answer, *times)
    return None


def _ever_more(devices: int) -> Iterator[int]:
    """Twice as many, and again."""
    most = max(2 * devices, min(_REACH * devices, _FAR))
    while 2 * devices <= most:
        devices *= 2
        yield devices


def _bounds(question: WhatIf) -> tuple[float, float]:
    """Times below which no number of devices comes: TTFT, TBT."""
    tbt_s, ttft_s = question.search.pricer.bounds(list(_endless(question)))
    return float(ttft_s.min()), float(tbt_s.min())


def _endless(question: WhatIf) -> Iterator[Layout]:
    """For each (t, p): one KVP group, as many as there are pages, and every helix, whose k is limited."""
    spec, workload, pins = question.spec, question.workload, question.degrees
    pages = math.ceil(total_tokens(workload) / page_size(workload)) * workload.concurrency
    for t in [pins["tp"]] if "tp" in pins else tensor_degrees(spec, question.cluster):
        cut = [k for k in range(2, spec.num_heads // t + 1) if ffn_fits("helix", t, k, spec)]
        for p in [pins["spp"]] if "spp" in pins else range(1, spec.num_layers + 1):
            yield Layout(t, p, pins.get("kvp", 1))
            yield from (Layout(t, p, k, "helix") for k in cut)
            if "kvp" not in pins:
                yield Layout(t, p, pages)


def _below(seconds: float) -> str:
    """A bound, rounded down to the digits that are printed."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return format_duration(math.floor(seconds / step) * step)
