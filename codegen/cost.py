"""Emits cost.py: the planner's formulas, printed as Python. Equal to the planner's by construction."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ..artifact import Plan
from .templating import render

_DOCS = {
    "step": "What every micro-batch costs a stage beside its ops.",
    "embed": "The embedding, on the first stage.",
    "rotation": "The rotations of the rows' positions, on every stage.",
    "layer": "One layer.",
    "head": "The head, on the last stage; skipped where no row wants logits.",
    "hop": "Sending the rows to the next stage.",
}


def render_cost(
    formulas: Mapping[str, Mapping[str, sympy.Expr]], host_s: Mapping[str, float], plan: Plan
) -> str:
    """The source of cost.py.

    formulas: block → part → seconds in the six symbols of `ir.sizes`; every block has every part
    host_s: by block, what its launches take the host; 0 where the host never waits for itself
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
        }
        for name in formulas
    ]
    last = len(plan.stages) - 1
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
        launch=parts.index("launch"),
        paced=any(host_s.values()),
        always=[f"{name}_parts_s" for name in ("step", "rotation") if name in formulas],
        overlaps=plan.target != "cpu" and last > 0,
        uses_math=any("math." in text for block in texts.values() for _, text in block),
    )
