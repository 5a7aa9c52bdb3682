"""Draws docs/plan.svg, the README's picture: what `mnemoc plan` prints for the example in it."""

import io
from pathlib import Path

from mnemoc import pipeline
from mnemoc.artifact import Workload
from mnemoc.planner.render import render_plan
from rich.console import Console

WIDTH = 110


def main() -> None:
    workload = Workload(context=10_000_000, ttft_s=600.0, tbt_s=0.030)
    planned = pipeline.plan("llama-3-8b", "dgx-h100", workload, nodes=16)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    screen = render_plan(planned.spec.name, planned.cluster.name, workload, planned.plan)
    console.print(screen)
    title = (
        "mnemoc plan llama-3-8b --cluster dgx-h100 --nodes 16 --context 10M --ttft 600s --tbt 30ms"
    )
    path = Path(__file__).with_name("plan.svg")
    path.write_text(console.export_svg(title=title, unique_id="plan"), encoding="utf-8")


if __name__ == "__main__":
    main()
