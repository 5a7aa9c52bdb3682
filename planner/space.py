"""The space that a plan is chosen from: layouts, KVP growth, stage splits.

Legend: t, p, k degrees of tp, spp, kvp; L layers; B requests at once; M tokens of a stripe.

**Layouts**: t divides the heads and the FFN, divides the KV heads or is a multiple of them (each is then
repeated on as many ranks), and does not straddle nodes; p ≤ L; t·p·k within the devices asked for. With
k > 1, output projection and FFN are repeated in each group or, where t·k divides the heads and the FFN, cut
over t·k ranks (helix).

**Growth**: the tokens of a stripe, M, say when a request takes on its next group (at M, 2M, …) and how its
keys lie from then on. *Contiguous*: a request of full length spreads over a of the k groups, a | k, once
round, so M = ⌈tokens / a⌉ in whole pages; with B requests laid end to end around the ring of groups, the
busiest group holds ⌈B·a/k⌉ of them. For one request alone a < k would leave groups idle, and a smaller
layout does the same, so then a = k. *Striped*: the stripes go round all k groups several times, about each
of ROUNDS, and all B requests may be at home on one group. Spread early, the keys of a context that is still
short lie on all groups too (against contiguous, up to half of a prompt's attention goes away); for it, all
rows are swapped and computed by all groups from early on. A stripe is a whole number of the chunks' unit,
or a half, a quarter … of it, so that chunks need not cross from one into the next.

**Splits**: layers are alike, so a split is its first stage f, its last stage l and its tallest stage μ. The
first also embeds, the last has the head. For each μ the sum f + l is as large as the others need it
small: max(2, L − μ·(p − 2)). With ρ = the dearer of embed and head, counted in layers (of time or of
weights, whichever is larger), μ ≥ ⌈L/p⌉ + ρ cannot win: even split would be no taller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from ..artifact import CONTIGUOUS, NCCL, NEVER_HALVED, Workload
from ..errors import BadInput, UsageError
from ..ir.model import ModelSpec
from ..layout import FFN_MODES, Layout
from .chunks import Riders, Spread, chunk_unit
from .cluster import Cluster
from .workload import total_tokens

AXES = ("tp", "spp", "kvp")
ROUNDS = (4, 32)

Pins = Mapping[str, int | str]
"""What is not to be chosen: degrees by axis, "ffn" by name, "stripe" in tokens or CONTIGUOUS,
"overlap" in rows or NEVER_HALVED, "all_reduce" as NCCL.
"""


@dataclass(frozen=True)
class Growth:
    """How requests of full length, `total` tokens, lie on KVP groups: dealt to them `stripe` at a time.

    helix: all groups compute every row
    """

    kvp: int
    stripe: int
    total: int
    page_size: int
    concurrency: int
    helix: bool = False

    @property
    def striped(self) -> bool:
        """Whether the stripes go round more than once."""
        return self.kvp * self.stripe < self.total

    @property
    def groups(self) -> int:
        """How many a request spreads over."""
        return min(self.kvp, math.ceil(self.total / self.stripe))

    @property
    def spread(self) -> Spread:
        ring = self.kvp if self.striped else None
        return Spread(self.stripe, ring, self.kvp if self.helix else None)

    @cached_property
    def tokens(self) -> int:
        """Of a request on its home group, in whole pages."""
        rounds, rest = divmod(self.total, self.kvp * self.stripe)
        held = rounds * self.stripe + min(rest, self.stripe)  # `Spread.held`, of one number
        return math.ceil(held / self.page_size) * self.page_size

    def riders(self, requests: int) -> Riders:
        """Decodes of so many full requests, on the busiest group."""
        count = math.ceil(requests * self.groups / self.kvp)
        if self.helix:
            return Riders(count, self.tokens, self.kvp, requests - count)
        return Riders(count, self.tokens, self.groups)

    @property
    def pages(self) -> int:
        """Per rank and layer on the busiest group."""
        return self.riders(self.concurrency).count * self.tokens // self.page_size


def layouts(spec: ModelSpec, cluster: Cluster, devices: int, pinned: Pins) -> tuple[Layout, ...]:
    """Every eligible layout, by GPUs. A pin that no layout can have is an error."""
    pins = check_pins(spec, cluster, devices, pinned)
    modes = [str(pinned["ffn"])] if "ffn" in pinned else FFN_MODES
    degrees = range(1, devices + 1)
    found = []
    for t in [pins["tp"]] if "tp" in pins else tensor_degrees(spec, cluster):
        for p in [pins["spp"]] if "spp" in pins else degrees[: spec.num_layers]:
            for k in [pins["kvp"]] if "kvp" in pins else degrees[: devices // (t * p)]:
                if t * p * k > devices:
                    continue
                found += [Layout(t, p, k, ffn) for ffn in modes if ffn_fits(ffn, t, k, spec)]
    if not found:
        raise BadInput(f"no layout of {spec.name} on {devices} devices has ffn=helix", do=_HELIX)
    return tuple(sorted(found, key=lambda layout: (layout.gpus, -layout.tp, layout.spp)))


def ffn_fits(ffn: str, t: int, k: int, spec: ModelSpec) -> bool:
    """Whether layouts of so many ranks to a stage can have this FFN mode."""
    if ffn == "repeated":
        return True
    return k > 1 and spec.num_heads % (t * k) == 0 and spec.ffn % (t * k) == 0


_HELIX = "helix needs kvp of at least 2, and tp × kvp that divides the heads and the FFN columns"


def tensor_degrees(spec: ModelSpec, cluster: Cluster) -> list[int]:
    return [t for t in range(1, cluster.devices_per_node + 1) if not _refusal(t, spec, cluster)]


def check_pins(spec: ModelSpec, cluster: Cluster, devices: int, pinned: Pins) -> Mapping[str, int]:
    """The pinned degrees, if there are layouts that have them all."""
    pins: dict[str, int] = {}
    for axis, degree in pinned.items():
        if axis == "ffn":
            if degree not in FFN_MODES:
                raise UsageError("unknown ffn", got=degree, do=f"one of {', '.join(FFN_MODES)}")
            continue
        if axis == "stripe":
            check_stripe(degree, pinned.get("kvp"))
            continue
        if axis == "overlap":
            check_overlap(degree, pinned.get("kvp"))
            continue
        if axis == "all_reduce":
            check_all_reduce(degree)
            continue
        if axis not in AXES:
            raise UsageError(
                f"unknown axis {axis!r}",
                do=f"pin {', '.join((*AXES, 'ffn', 'stripe', 'overlap', 'all_reduce'))}",
            )
        if not isinstance(degree, int) or degree < 1:
            raise UsageError(f"{axis} must be at least 1", got=degree)
        pins[axis] = degree
    if refusal := _refusal(pins.get("tp", 1), spec, cluster):
        fits = ", ".join(map(str, tensor_degrees(spec, cluster)))
        raise BadInput(refusal, do=f"degrees of tp that fit: {fits}")
    if pins.get("spp", 1) > spec.num_layers:
        raise BadInput(f"spp={pins['spp']} is more than the {spec.num_layers} layers")
    text = ",".join(f"{axis}={degree}" for axis, degree in pins.items())
    asked = math.prod(pins.values())
    if asked > devices:
        raise BadInput(
            f"{text} needs {asked} devices; the plan may use {devices}",
            where=cluster.name,
            do="pin less, or allow more with --gpus or --nodes",
        )
    if (
        "kvp" in pins
        and "tp" in pins
        and not ffn_fits(str(pinned.get("ffn", "repeated")), pins["tp"], pins["kvp"], spec)
    ):
        raise BadInput(f"{text} does not allow ffn=helix for {spec.name}", do=_HELIX)
    return pins


def check_stripe(stripe: int | str, kvp: int | str | None) -> None:
    """UsageError if it is no stripe, or there is only one group to deal to."""
    if stripe != CONTIGUOUS and (not isinstance(stripe, int) or stripe < 1):
        raise UsageError(
            "not a stripe", got=stripe, do=f"give tokens, such as 64K, or {CONTIGUOUS}"
        )
    if kvp == 1 and stripe != CONTIGUOUS:
        raise UsageError("stripes need kvp of at least 2", got=f"stripe={stripe}, kvp=1")


def check_overlap(rows: int | str, kvp: int | str | None) -> None:
    """UsageError if no chunk of so many rows has two halves, or nothing would travel."""
    if rows != NEVER_HALVED and (not isinstance(rows, int) or rows < 2):
        raise UsageError(
            "not an overlap", got=rows, do=f"give rows of a chunk, 2 or more, or {NEVER_HALVED}"
        )
    if kvp == 1 and rows != NEVER_HALVED:
        raise UsageError("overlap needs kvp of at least 2", got=f"overlap={rows}, kvp=1")


def check_all_reduce(whose: int | str) -> None:
    """UsageError if it is not NCCL, the only kind that can be pinned: the other pays or does not."""
    if whose != NCCL:
        raise UsageError("unknown all_reduce", got=whose, do=f"give {NCCL}, or leave it out")


def _refusal(t: int, spec: ModelSpec, cluster: Cluster) -> str | None:
    """Why tp = t does not fit, if it does not."""
    for what, count in (("heads", spec.num_heads), ("FFN columns", spec.ffn)):
        if count % t:
            return f"tp={t} does not divide the {count} {what} of {spec.name}"
    if spec.num_kv_heads % t and t % spec.num_kv_heads:
        return f"tp={t} neither divides nor repeats the {spec.num_kv_heads} KV heads of {spec.name}"
    per_node = cluster.devices_per_node
    if t > per_node:
        return f"tp={t} is more than the {per_node} devices of a node of {cluster.name}"
    if cluster.nodes > 1 and per_node % t:
        return f"tp={t} does not divide the {per_node} devices of a node of {cluster.name}"
    return None


def page_size(workload: Workload) -> int:
    """Tokens per page: large for long runs of contiguous keys, small where waste would show."""
    return 64 if total_tokens(workload) >= 4096 else 16


def growths(layout: Layout, workload: Workload, pinned: Pins) -> Iterator[Growth]:
    """The growth choices of a layout; where its groups are pinned, some of them may stay idle."""
    kvp, total, page = layout.kvp, total_tokens(workload), page_size(workload)
    asked = pinned.get("stripe") if kvp > 1 else CONTIGUOUS

    def shard(groups: int) -> int:
        return math.ceil(total / groups / page) * page

    stripes: list[int] = []
    if asked is None or asked == CONTIGUOUS:
        alone = workload.concurrency == 1 and "kvp" not in pinned
        over = [kvp] if alone else [groups for groups in range(1, kvp + 1) if kvp % groups == 0]
        stripes += [shard(groups) for groups in over if (groups - 1) * shard(groups) < total]
    if asked is None:
        unit = chunk_unit(workload.context)
        fit = {_evenest(total // (kvp * rounds), unit, page, kvp, total) for rounds in ROUNDS}
        stripes += sorted((stripe for stripe in fit if stripe < shard(kvp)), reverse=True)
    elif asked != CONTIGUOUS:
        stripes += [min(shard(kvp), uncrossed(int(asked), chunk_unit(workload.context), page))]
    for stripe in stripes:
        yield Growth(kvp, stripe, total, page, workload.concurrency, layout.helix)


def uncrossed(tokens: int, unit: int, page: int) -> int:
    """The smallest stripe of at least so many tokens that the menu's chunks need not cross."""
    if tokens > unit:
        return math.ceil(tokens / unit) * unit
    while unit % (2 * page) == 0 and unit // 2 >= tokens:
        unit //= 2
    return unit


@cache
def _evenest(tokens: int, unit: int, page: int, kvp: int, total: int) -> int:
    """Of the whole units between about so many tokens and a quarter more: what leaves home the least."""
    if tokens < unit:
        return uncrossed(tokens, unit, page)
    least = tokens // unit
    stripes = (units * unit for units in range(least, least + least // 4 + 1))
    return min(stripes, key=lambda stripe: float(Spread(stripe, kvp).held(np.array(float(total)))))


def splits(layers: int, stages: int, excess: float) -> tuple[tuple[int, ...], ...]:
    """Candidate layer counts per stage; `excess` is ρ above."""
    if stages == 1:
        return ((layers,),)
    even = math.ceil(layers / stages)
    tallest = math.ceil(even + excess)
    if stages == 2:
        low, high = max(1, layers - tallest), min(layers - 1, tallest)
        return tuple((f, layers - f) for f in range(low, high + 1))
    found = {
        (first, *_spread(layers - ends, stages - 2), ends - first)
        for top in range(even, tallest + 1)
        for ends in (max(2, layers - top * (stages - 2)),)
        for first in range(max(1, ends - top), min(top, ends - 1) + 1)
        if layers - ends >= stages - 2
    }
    return tuple(sorted(found))


def _spread(layers: int, stages: int) -> tuple[int, ...]:
    """As even as it gets, the taller stages first."""
    low, more = divmod(layers, stages)
    return (low + 1,) * more + (low,) * (stages - more)


def devices_asked(cluster: Cluster, *, nodes: int | None, gpus: int | None) -> int:
    """Most devices that a plan may use, from `--nodes` or `--gpus`; all of the cluster by default."""
    if nodes is not None and gpus is not None:
        raise UsageError("--nodes and --gpus exclude each other", do="give one of them")
    asked = cluster.devices
    if nodes is not None:
        asked = nodes * cluster.devices_per_node
    elif gpus is not None:
        asked = gpus
    if asked < 1:
        raise UsageError("a plan needs at least one device", got=asked)
    if asked > cluster.devices:
        raise BadInput(
            f"{asked} devices are more than {cluster.name} has",
            where=cluster.origin,
            got=f"{cluster.nodes} nodes of {cluster.devices_per_node}",
            do="ask for fewer, or give a cluster file with more nodes",
        )
    return asked
