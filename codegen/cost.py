"""Emits cost.py: the planner's formulas, printed as Python. Equal to the planner's by construction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import sympy

from ..artifact import Plan, Stage
from ..speeds import Swap
from .templating import render

_DOCS = {
    "step": "What every micro-batch costs a stage beside its ops.",
    "embed": "The embedding, on the first stage.",
    "entry": "What every stage begins with: the rotations of positions, the norm of its first layer.",
    "layer": "One layer.",
    "halves": "One layer in two halves: partial results of one travel while the other is computed.",
    "head": "The head, on the last stage; skipped where no row wants logits.",
    "hop": "Sending the rows to the next stage.",
}


def render_cost(
    formulas: Mapping[str, Mapping[str, sympy.Expr]],
    host_s: Mapping[str, float],
    plan: Plan,
    swap: Swap | None = None,
) -> str:
    """The source of cost.py.

    formulas: block → part → seconds in the six symbols of `ir.sizes`; every block has every part; with
        "halves", of a layer in two halves, where the plan has chunks go in them
    host_s: by block, what its launches take the host; 0 where the host never waits for itself
    swap: of pages to host memory and back, where there is any
    """
    parts = list(formulas["layer"])
    texts = {
        name: [(part, sympy.pycode(formula[part])) for part in parts]
        for name, formula in formulas.items()
    }
    blocks = [
        {
            "name": name,
            "doc": _DOCS[name],
            "host_s": host_s[name],
            "parts": texts[name],
            "total": _total(formula, host_s[name]),
        }
        for name, formula in formulas.items()
    ]
    last = len(plan.stages) - 1
    overlaps = plan.target != "cpu" and last > 0
    stages = [
        {"layers": s.num_layers, "embeds": i == 0, "heads": i == last, "sends": i < last}
        for i, s in enumerate(plan.stages)
    ]
    return render(
        "cost.py.j2",
        title=f"{plan.layout}, {plan.target}.",
        parts=parts,
        stages=stages,
        blocks=blocks,
        halves=next((block["total"] for block in blocks if block["name"] == "halves"), None),
        least_rows=plan.overlap_rows,
        launch=parts.index("launch"),
        paced=any(host_s.values()),
        every=[block["total"] for block in blocks if block["name"] in ("step", "entry")],
        always=[f"{name}_parts_s" for name in ("step", "entry") if name in formulas],
        crossing=_sum(len(plan.stages), sum(s.num_layers for s in plan.stages), _ENDS, last),
        overlaps=overlaps,
        paces=[*_paces(plan.stages, hops=not overlaps), *(["hop"] if overlaps else [])],
        swap=swap and (f"{swap.latency_s:.15g}", f"{swap.page_s:.15g}"),
        uses_math=swap is None
        or any("math." in text for block in texts.values() for _, text in block),
    )


_ENDS = ("embed", "head")


def _total(parts: Mapping[str, sympy.Expr], host_s: float) -> str:
    """A block's seconds in one expression, of like terms once."""
    total = sympy.pycode(sympy.Add(*parts.values()))
    return f"max({total}, {host_s})" if host_s else total


def _sum(stages: int, layers: int, ends: tuple[str, ...], hops: int) -> str:
    """Seconds of what so many stages do in all, from those of the blocks."""
    counted = ((stages, "every"), (layers, "layer"), *((1, end) for end in ends), (hops, "hop"))
    terms = (name if count == 1 else f"{count} * {name}" for count, name in counted if count)
    return " + ".join(terms)


def _paces(stages: tuple[Stage, ...], *, hops: bool) -> Iterator[str]:
    """Seconds of the stages of which one is slowest: of each kind the tallest. hops: with what they send."""
    tallest: dict[tuple[tuple[str, ...], int], int] = {}
    for place, stage in enumerate(stages):
        first, last = place == 0, place == len(stages) - 1
        ends = tuple(end for end, here in zip(_ENDS, (first, last), strict=True) if here)
        kind = ends, int(hops and not last)
        tallest[kind] = max(stage.num_layers, tallest.get(kind, 0))
    for (ends, sends), layers in tallest.items():
        yield _sum(1, layers, ends, sends)
