"""Commands that look at a plan and run nothing of it: what it holds, and what it says to other engines."""

from __future__ import annotations

from pathlib import Path

import click

from . import console
from .errors import UsageError
from .options import folder

REPORT = "report.html"


@click.command()
@click.argument("directory", type=folder)
@click.argument("what", nargs=-1)
@click.option("--open", "in_browser", is_flag=True, help="Open the report in the browser.")
def show(directory: Path, what: tuple[str, ...], in_browser: bool) -> None:
    """Show what a plan holds: plan, report, ir, schedule, kernel NAME, or a FILE of it.

    \b
    Example:
      mnemoc show plan/ kernel attention_prefill
      mnemoc show plan/ report --open
    """
    from . import artifact

    manifest, contents = artifact.load(directory)
    if in_browser and what != ("report",):
        raise UsageError("--open is for the report", do=f"mnemoc show {directory} report --open")
    if what == ("report",):
        (name,) = console.wanted_files(contents, (REPORT,))
        _show_report(directory / name, in_browser=in_browser)
        return
    if what in ((), ("plan",)):
        console.print_plan(
            str(manifest.model["name"]),
            str(manifest.cluster["name"]),
            manifest.workload,
            manifest.plan,
            directory,
        )
        return
    for name in console.wanted_files(contents, what):
        if len(what) == 1 and what[0] != name:
            click.secho(f"# {name}", dim=True)
        console.print_source(console.as_text(contents[name], name), name)


def _show_report(page: Path, *, in_browser: bool) -> None:
    """The page's path on stdout; how to see it on stderr, or seeing it."""
    click.echo(page)
    if not in_browser:
        console.remark("open it in a browser, or add --open")
        return
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        raise UsageError("no browser could be started", do=f"open {page} yourself")
