"""Makes the README's pictures of one plan: docs/plan.svg, what `mnemoc plan` prints for the example in
it, and docs/report.png, the top of its report in Chromium."""

import io
import shutil
import tempfile
from pathlib import Path

from mnemoc import pipeline
from mnemoc.artifact import Workload
from mnemoc.planner.render import render_plan
from playwright.sync_api import sync_playwright
from rich.console import Console

WIDTH = 110
HERE = Path(__file__).parent


def main() -> None:
    workload = Workload(context=10_000_000, ttft_s=600.0, tbt_s=0.030)
    planned = pipeline.plan("llama-3-8b", "dgx-h100", workload, nodes=16)
    draw_terminal(planned)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.emit(planned, Path(folder) / "plan")
        photograph(Path(folder) / "plan" / "report.html")


def draw_terminal(planned: pipeline.Planned) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    screen = render_plan(planned.spec.name, planned.cluster.name, planned.workload, planned.plan)
    console.print(screen)
    title = (
        "mnemoc plan llama-3-8b --cluster dgx-h100 --nodes 16 --context 10M --ttft 600s --tbt 30ms"
    )
    svg = console.export_svg(title=title, unique_id="plan")
    (HERE / "plan.svg").write_text(svg, encoding="utf-8")


def photograph(page: Path) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": 880, "height": 1320}, color_scheme="light")
        tab.goto(page.as_uri())
        tab.screenshot(path=HERE / "report.png")
        browser.close()


if __name__ == "__main__":
    main()
