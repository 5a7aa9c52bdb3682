"""Commands that look at a plan and run nothing of it: what it holds, and what it says to other engines."""

from __future__ import annotations

import json
from pathlib import Path

import click

from . import console
from .errors import BadInput, UsageError
from .options import ENGINES, folder, json_flag

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
    from .folder import load_artifact

    manifest, contents = load_artifact(directory)
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


@click.command()
@click.argument("directory", type=folder)
@click.option("--to", "engine", type=click.Choice(ENGINES), required=True, help="The engine.")
@click.option("-o", "--out", type=folder, metavar="FILE", help="Write it there; stdout otherwise.")
@json_flag
def export(directory: Path, engine: str, out: Path | None, as_json: bool) -> None:
    """Write a plan as the command or file that comes closest on another engine.

    What that engine cannot express stands at its head, with the reason.

    \b
    Example:
      mnemoc export plan/ --to vllm -o serve.sh
    """
    from . import pipeline
    from .codec import to_json

    made = pipeline.export(directory, engine)
    if out is not None:
        try:
            out.write_text(made.text, encoding="utf-8")
            out.chmod(0o755 if made.text.startswith("#!") else 0o644)
        except OSError as error:
            raise BadInput(f"cannot write: {error.strerror}", where=out) from error
    if as_json:
        click.echo(json.dumps(to_json(made)))
    elif out is not None:
        click.echo(f"{out}: {len(made.gaps)} things of the plan are not in it, see its head")
    else:
        console.print_source(made.text, "export.sh" if engine != "trtllm" else "export.yaml")
