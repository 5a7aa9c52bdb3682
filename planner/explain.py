"""Why this plan: what binds, what else was possible and at what price, what one more node buys.

And why none: the constraint that no plan keeps, and the cheapest ways to relax the promise.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from ..artifact import Alternative
from ..errors import Infeasible
from ..units import format_bytes, format_duration
from .candidate import Candidate, best_chunks
from .price import NEVER, Outlook
from .search import Finding, Promise, Search, balanced_bytes
from .space import AXES


def binding(search: Search, found: Finding, promise: Promise, objective: str) -> str:
    """The constraint without which the objective would be better: a name of `milp`, or "none"."""
    if objective == "gpus":
        smaller = [o for o in search.outlooks if o.gpus < found.outlook.gpus]
        if not smaller:
            return "none"
        if any(search.bound_s(o, promise.tbt_s) < NEVER for o in smaller):
            return "ttft"
        return "tbt" if any(search.fits(o) for o in smaller) else "memory"
    if objective == "ttft":
        freer = search.best(found.outlook, NEVER)
        if freer is not None and freer.ttft_s < found.ttft_s * 0.999:
            return "tbt"
    largest = max(o.gpus for o in search.outlooks)
    return "devices" if found.outlook.gpus == largest else "none"


def alternatives(
    search: Search, found: Finding, promise: Promise, objective: str
) -> tuple[Alternative, ...]:
    """The best few other layouts, each with what it would give and why it was not chosen."""
    rows: dict[str, Alternative] = {}
    for outlook in itertools.islice(_contenders(search, found, promise), 5):
        rows.setdefault(
            str(outlook.layout), _alternative(search, outlook, found, promise, objective)
        )
    return tuple(rows.values())


def _contenders(search: Search, found: Finding, promise: Promise) -> Iterator[Outlook]:
    """Runner-up first, then one with fewer GPUs, then one that stays 2D, then the next best."""
    others = [o for o in search.outlooks if o.layout != found.outlook.layout and search.fits(o)]
    keeping = [o for o in others if search.possible(o, promise.tbt_s)]
    near = sorted(keeping, key=lambda o: o.floor_s)
    same = _nearest(search, promise, (o for o in near if o.gpus == found.outlook.gpus))
    fewer = _nearest(search, promise, (o for o in near if o.gpus < found.outlook.gpus))
    flat = sorted(
        (o for o in others if o.layout.kvp == 1 and o.gpus <= found.outlook.gpus),
        key=lambda o: (-o.gpus, o.decode_s),
    )
    seen: set[int] = set()
    for outlook in (*same[:1], *fewer[:1], *flat[:1], *same[1:3], *fewer[1:]):
        if id(outlook) not in seen:
            seen.add(id(outlook))
            yield outlook


def _nearest(search: Search, promise: Promise, outlooks: Iterator[Outlook]) -> list[Outlook]:
    """The first few, given by their cheapest bound, in the order of their better one."""
    few = itertools.islice(outlooks, 8)
    bounded = [(search.bound_s(o, promise.tbt_s), i, o) for i, o in enumerate(few)]
    return [o for bound, _, o in sorted(bounded, key=lambda item: item[:2]) if bound < NEVER]


def _alternative(
    search: Search, outlook: Outlook, found: Finding, promise: Promise, objective: str
) -> Alternative:
    layout, gpus = outlook.layout, outlook.gpus
    best = search.best(outlook, promise.tbt_s)
    if best is None:
        loose = search.best(outlook, NEVER)
        ttft_s = loose.ttft_s if loose is not None else NEVER
        slow = outlook.decode_s > promise.tbt_s
        reason = (
            f"decodes at full length take {format_duration(outlook.decode_s)}, "
            f"above {format_duration(promise.tbt_s)}"
            if slow
            else "no chunk size keeps TBT and memory"
        )
        return Alternative(layout, gpus, _finite(ttft_s), outlook.decode_s, reason)
    if best.ttft_s > promise.ttft_s:
        reason = f"TTFT above {format_duration(promise.ttft_s)}"
    elif objective == "throughput" and outlook.decode_s > found.outlook.decode_s:
        reason = "slower decodes"
    elif gpus > found.outlook.gpus and objective == "gpus":
        reason = f"{gpus - found.outlook.gpus} more GPUs"
    else:
        reason = f"TTFT {best.ttft_s / found.ttft_s - 1:+.1%}"
    return Alternative(layout, gpus, best.ttft_s, best.tbt_s, reason)


def _finite(seconds: float) -> float:
    """JSON knows no infinity: a time that is never reached is given as −1."""
    return seconds if seconds < NEVER else -1.0


def remarks(search: Search, found: Finding, promise: Promise, objective: str) -> Iterator[str]:
    """Sentences for people: what binds, and what one more node buys."""
    yield _why(search, found, promise, objective)
    if search.pinned or objective == "throughput":
        return
    cluster, gpus = search.pricer.cluster, found.outlook.gpus
    many = cluster.nodes > 1
    devices = gpus + cluster.devices_per_node if many else cluster.devices
    if devices <= gpus:
        return
    wider = Search(search.pricer, devices, search.pinned, above=gpus)
    faster = wider.fastest(wider.outlooks, promise.tbt_s, found.ttft_s)
    name = "One more node" if many else f"All {devices} devices"
    if faster is None:
        yield f"{name} would not shorten TTFT."
    else:
        gain = 1 - faster.ttft_s / found.ttft_s
        yield (
            f"{name} would cut TTFT by {gain:.0%} to {format_duration(faster.ttft_s)} "
            f"({faster.outlook.layout})."
        )


def _why(search: Search, found: Finding, promise: Promise, objective: str) -> str:
    name, gpus = binding(search, found, promise, objective), found.outlook.gpus
    if name == "ttft":
        smaller = [o for o in search.outlooks if o.gpus < gpus]
        best = search.fastest(smaller, promise.tbt_s, NEVER)
        if best is not None:
            return (
                f"TTFT binds: with fewer than {gpus} devices the best is "
                f"{format_duration(best.ttft_s)} ({best.outlook.layout})."
            )
        return f"TTFT binds: fewer than {gpus} devices do not reach it."
    if name == "tbt":
        limit = format_duration(promise.tbt_s)
        if objective == "gpus":
            return f"TBT binds: with fewer than {gpus} devices nothing keeps {limit}."
        return f"TBT binds: larger chunks would shorten TTFT and break {limit}."
    if name == "memory":
        return "Memory binds: on fewer devices weights and KV cache do not fit."
    if name == "devices":
        return f"The number of devices binds: all {search.devices} that may be used help."
    if gpus == 1:
        return "Nothing binds: one device is enough."
    return "Nothing binds: what is pinned leaves nothing better."


# ---------------------------------------------------------------------------------- infeasible


def infeasible(search: Search, promise: Promise) -> Infeasible:
    """Which constraint no plan keeps, and the cheapest ways to relax the promise."""
    devices, cluster = search.devices, search.pricer.cluster
    if not any(search.fits(o) for o in search.outlooks):
        least = min(balanced_bytes(o) for o in search.outlooks)
        return Infeasible(
            f"memory: weights and KV cache need {format_bytes(least)} on the fullest device, "
            f"{format_bytes(cluster.usable_bytes)} are usable on {devices} devices",
            binding="memory",
            do=_relaxed(_more_devices(search, promise) or _more_memory(search)),
        )
    fast = search.fastest(search.outlooks, promise.tbt_s, NEVER)
    options = [_more_devices(search, promise)]
    if fast is None:
        options.insert(0, _laxer_tbt(search, promise))
        return Infeasible(
            f"tbt: no layout on {devices} devices keeps TBT {format_duration(promise.tbt_s)} "
            f"at this context",
            binding="tbt",
            do=_relaxed(*options),
        )
    options.insert(0, f"TTFT {_quoted(fast.ttft_s)} ({fast.outlook.layout})")
    tbt_s = _least_tbt(search, promise.ttft_s)
    options.insert(1, f"TBT {_quoted(tbt_s)}" if tbt_s < NEVER else None)
    return Infeasible(
        f"ttft: the best TTFT on {devices} devices is {format_duration(fast.ttft_s)} with TBT "
        f"{format_duration(promise.tbt_s)}, promised {format_duration(promise.ttft_s)}",
        binding="ttft",
        do=_relaxed(*options),
    )


def _quoted(seconds: float) -> str:
    """A duration rounded up to the digits that are printed: what is read must be feasible."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    step = 60.0 if seconds >= 3600 else 1.0 if seconds >= 600 else step
    return format_duration(math.ceil(seconds / step * (1 - 1e-12)) * step)


def _relaxed(*options: str | None) -> str:
    possible = [option for option in options if option]
    if not possible:
        return "no relaxation of one figure alone makes it feasible: shorten the context"
    return f"feasible with {' or '.join(possible)}"


def _laxer_tbt(search: Search, promise: Promise) -> str | None:
    """The least TBT that some plan keeps, with the TTFT that goes with it where that is laxer too."""
    tbt_s = _least_tbt(search, promise.ttft_s)
    if tbt_s < NEVER:
        return f"TBT {_quoted(tbt_s)}"
    tbt_s = _least_tbt(search, NEVER) * (1 + 1e-9)
    fast = search.fastest(search.outlooks, tbt_s, NEVER) if tbt_s < NEVER else None
    return f"TBT {_quoted(tbt_s)} and TTFT {_quoted(fast.ttft_s)}" if fast is not None else None


def _least_tbt(search: Search, ttft_s: float) -> float:
    """The smallest TBT promise with which some plan keeps the TTFT promise."""
    least = NEVER
    for outlook in sorted(search.outlooks, key=lambda o: o.decode_s):
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


def _more_memory(search: Search) -> str | None:
    """The smallest number of devices that holds weights and KV, whatever the times."""
    wider = Search(search.pricer, 4 * search.devices, search.pinned, above=search.devices)
    holding = [o.gpus for o in wider.outlooks if search.fits(o)]
    return f"{min(holding)} devices and laxer times" if holding else None


def _more_devices(search: Search, promise: Promise) -> str | None:
    """The smallest number of devices beyond those allowed that keeps the promise, up to 4 times."""
    if search.pinned.keys() >= set(AXES):
        return None
    for times in (2, 4):
        above = times // 2 * search.devices
        wider = Search(search.pricer, times * search.devices, search.pinned, above=above)
        found = wider.incumbent(promise, "gpus")
        if found is not None:
            return f"{found.outlook.gpus} devices ({found.outlook.layout})"
    return None
