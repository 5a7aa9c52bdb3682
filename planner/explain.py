"""Why this plan: what binds, what else was possible and at what price, what a little more would buy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from operator import itemgetter

from ..alternatives import Alternative, Marginal
from ..layout import Layout
from ..units import format_duration
from .candidate import make_candidate
from .outlook import NEVER, Outlook
from .search import Finding, Promise, Search
from .what_if import Answer, WhatIf

TTFT_SHARE = 0.1
TBT_STEP_S = 0.005


def binding(search: Search, found: Finding, promise: Promise, objective: str) -> str:
    """The constraint without which the objective would be better: a name of `milp`, or "none"."""
    if objective == "gpus":
        fewer = found.outlook.gpus - 1
        if not search.layouts(fewer):
            return "none"
        keeping = search.outlooks(fewer, promise.tbt_s)
        if any(search.bound_s(o, promise.tbt_s) < NEVER for o in keeping):
            return "ttft"
        smaller = search.outlooks(fewer)
        return "tbt" if any(search.fits(o) for o in smaller) else "memory"
    if objective == "ttft":
        freer = search.best(found.outlook, NEVER)
        if freer is not None and freer.ttft_s < found.ttft_s * 0.999:
            return "tbt"
    largest = search.layouts(promise.devices)[-1]
    return "devices" if found.outlook.gpus == largest.gpus else "none"


def alternatives(
    search: Search, found: Finding, promise: Promise, objective: str
) -> tuple[Alternative, ...]:
    """The best few other layouts, each with what it would give and why it was not chosen."""
    few = itertools.islice(_contenders(search, found, promise), 5)
    return tuple(_alternative(search, outlook, found, promise, objective) for outlook in few)


def _contenders(search: Search, found: Finding, promise: Promise) -> Iterator[Outlook]:
    """Runner-up first, then one with fewer GPUs, then one that stays 2D, then the next best."""
    chosen = found.outlook.layout
    near = [layout for layout in search.near(chosen.gpus, promise.tbt_s) if layout != chosen]
    same = _nearest(search, promise, (x for x in near if x.gpus == chosen.gpus))
    fewer = _nearest(search, promise, (x for x in near if x.gpus < chosen.gpus))
    without = (x for x in search.layouts(chosen.gpus) if x.kvp == 1 and x != chosen)
    flat = sorted(
        (o for layout in without for o in search.grown(layout) if search.fits(o)),
        key=lambda o: (-o.gpus, o.decode_s),
    )
    seen: set[Layout] = set()
    for outlook in (*same[:1], *fewer[:1], *flat[:1], *same[1:3], *fewer[1:]):
        if outlook.layout not in seen:
            seen.add(outlook.layout)
            yield outlook


def _nearest(search: Search, promise: Promise, layouts: Iterator[Layout]) -> list[Outlook]:
    """The first few layouts that keep TBT, each with the growth of its least bound on TTFT, in its order."""
    few: list[tuple[float, Outlook]] = []
    for layout in layouts:
        bounds = [(search.bound_s(o, promise.tbt_s), o) for o in search.grown(layout)]
        kept = [pair for pair in bounds if pair[0] < NEVER]
        if kept:
            few.append(min(kept, key=itemgetter(0)))
        if len(few) == 8:
            break
    return [outlook for _, outlook in sorted(few, key=itemgetter(0))]


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


def marginals(question: WhatIf, found: Finding) -> Iterator[Marginal]:
    """What one node (of a single machine: one device), 10 % of TTFT and 5 ms of TBT are worth.

    Each is solved again, laxer and stricter. More GPUs cannot lessen an objective of GPUs; there they
    buy TTFT, and fewer pay with it.
    """
    promise, objective = question.promise, question.workload.objective
    cluster, gpus = question.cluster, found.outlook.gpus
    for share in (TTFT_SHARE, -TTFT_SHARE):
        moved_s = round(promise.ttft_s * (1 + share), 9)
        answer = question.solve(ttft_s=moved_s)
        asked = Promise(moved_s, promise.tbt_s, promise.devices)
        yield _marginal(question, found, "ttft", asked, objective, answer)
    for step_s in (TBT_STEP_S, -TBT_STEP_S):
        moved_s = round(promise.tbt_s + step_s, 9)
        if moved_s > 0:
            answer = question.solve(tbt_s=moved_s)
            asked = Promise(promise.ttft_s, moved_s, promise.devices)
            yield _marginal(question, found, "tbt", asked, objective, answer)
    many = cluster.nodes > 1
    change, step = ("node", cluster.devices_per_node) if many else ("device", 1)
    base = gpus if objective == "gpus" else promise.devices
    minimised = "ttft" if objective == "gpus" else objective
    ttft_s = NEVER if minimised == "ttft" else promise.ttft_s
    for devices in (base + step, base - step):
        if devices >= 1 and (many or devices <= cluster.devices):
            answer = question.solve(ttft_s=ttft_s, gpus=devices, objective=minimised)
            asked = Promise(ttft_s, promise.tbt_s, devices)
            yield _marginal(question, found, change, asked, minimised, answer)


def _marginal(
    question: WhatIf,
    found: Finding,
    change: str,
    asked: Promise,
    minimised: str,
    answer: Answer | None,
) -> Marginal:
    return Marginal(
        change=change,
        gpus=asked.devices,
        ttft_s=asked.ttft_s if math.isfinite(asked.ttft_s) else None,
        tbt_s=asked.tbt_s,
        minimised=minimised,
        before=question.answer(found, minimised).objective,
        objective=answer.objective if answer is not None else None,
        point=answer.point if answer is not None else None,
    )


def why(search: Search, found: Finding, promise: Promise, objective: str) -> str:
    """What binds, in a sentence."""
    name, gpus = binding(search, found, promise, objective), found.outlook.gpus
    if name == "ttft":
        best = search.fastest(search.outlooks(gpus - 1, promise.tbt_s), promise.tbt_s, NEVER)
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
        return "Memory binds: on fewer devices weights, KV cache and buffers do not fit."
    if name == "devices":
        return f"The number of devices binds: all {promise.devices} that may be used help."
    if gpus == 1:
        return "Nothing binds: one device is enough."
    return "Nothing binds: what is pinned leaves nothing better."


def overlapping(search: Search, found: Finding) -> Iterator[str]:
    """What the chosen chunks would take if none of them went in halves."""
    if rows := found.outlook.overlap_rows:
        whole_s = _whole_s(search, found)
        yield (
            f"Chunks of {rows:,} rows or more on several groups go through layers in two halves: one's "
            f"partial results travel while the other is computed. Whole, TTFT would be "
            f"{format_duration(whole_s)} ({whole_s / found.ttft_s - 1:+.1%})."
        )


def summing(search: Search, found: Finding) -> Iterator[str]:
    """From how many rows on sums over tp are NCCL's."""
    if rows := search.pricer.one_shot_rows(found.outlook.layout):
        yield (
            f"Sums over tp of up to {rows:,} rows are read from the peers' memory; of more, they are NCCL's."
        )


def halves_lose(search: Search, found: Finding) -> bool:
    """Whether halves, worth it for chunks at the middle of the context, are not for the chosen ones."""
    return found.outlook.overlap_rows > 0 and _whole_s(search, found) <= found.ttft_s


def _whole_s(search: Search, found: Finding) -> float:
    """TTFT of the same split and chunks, none of them in halves."""
    outlook = found.outlook
    whole = search.pricer.outlook(outlook.layout, outlook.growth, whole=True)
    candidate = make_candidate(whole, found.candidate.split, NEVER, 1 << 62)
    return candidate.ttft_s(found.choice)


def dealing(search: Search, found: Finding, promise: Promise) -> Iterator[str]:
    """What contiguous shards would give, where the plan deals a request to its groups in stripes."""
    if not found.outlook.growth.striped:
        return
    whole = [o for o in search.grown(found.outlook.layout) if not o.growth.striped]
    best = search.fastest(whole, promise.tbt_s, NEVER)
    if best is None:
        yield "In one run on each group, not in stripes, tokens would break TBT or memory."
    elif best.ttft_s > found.ttft_s:
        yield (
            f"In one run on each group, not in stripes, TTFT would be "
            f"{format_duration(best.ttft_s)} ({best.ttft_s / found.ttft_s - 1:+.0%})."
        )
