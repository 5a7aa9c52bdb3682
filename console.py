"""What the terminal sees: progress on stderr, highlighted text on stdout, errors as one sentence."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol, cast

from .codec import to_json
from .errors import Infeasible, MnemocError, UsageError
from .units import format_duration

if TYPE_CHECKING:
    from pygments.lexer import Lexer
    from rich.console import Console

    from .alternatives import Frontier
    from .artifact import Plan, Workload

SCREEN_WIDTH = 110  # of a plan, where stdout is no terminal


class Progress(Protocol):
    """Told what is being done and, where it is known, the fraction that is done and the rest."""

    def __call__(
        self, what: str, fraction: float | None = None, eta_s: float | None = None
    ) -> None: ...


EXIT_FAULT = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: workers are ended, files finished or taken away."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with an ETA on stderr while the block runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield _unseen
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[rest]}"),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, rest="")

        def update(what: str, fraction: float | None = None, eta_s: float | None = None) -> None:
            total = None if fraction is None else 1.0
            bar.update(task, description=what, total=total, completed=fraction or 0.0)
            rest = bar.tasks[0].time_remaining if eta_s is None else eta_s
            bar.update(task, rest="" if rest is None else f"ETA {format_duration(rest)}")

        yield update


@contextmanager
def streaming(visible: bool) -> Iterator[tuple[Callable[[str], None], Progress]]:
    """Text on stdout piece by piece, with a progress bar on stderr until the first piece comes."""
    written = False
    with ExitStack() as bar:
        progress = bar.enter_context(progress_bar())

        def write(piece: str) -> None:
            nonlocal written
            if visible and piece:
                bar.close()
                sys.stdout.write(piece)
                sys.stdout.flush()
                written = True

        try:
            yield write, progress
        finally:
            if written:
                sys.stdout.write("\n")


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection while the block runs, for a short one that keeps what it makes.

    Importing sympy and pricing a space make a million objects that stay: looking through them again and
    again is a seventh of `mnemoc plan`.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def remark(text: str) -> None:
    """A line on stderr, for what runs until it is stopped; a full disk behind it is no reason to stop."""
    try:
        stderr = sys.stderr.fileno()
    except OSError:  # somebody reads it in this process
        print(text, file=sys.stderr)
        return
    with suppress(OSError):
        os.write(stderr, f"{text}\n".encode())


def _unseen(what: str, fraction: float | None = None, eta_s: float | None = None) -> None:
    """Progress that nobody watches."""


def print_plan(
    model: str,
    cluster: str,
    workload: Workload,
    plan: Plan,
    out: Path | None,
    *,
    pareto: bool = False,
) -> None:
    """The plan on one screen; pareto: with its frontier."""
    from .planner.render import render_plan

    _screen().print(render_plan(model, cluster, workload, plan, out, pareto=pareto))


def print_frontier(frontier: Frontier, workload: Workload) -> None:
    """What can be had where the promise cannot."""
    from .planner.render_frontier import render_frontier

    _screen().print(render_frontier(frontier, workload))


def _screen() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else SCREEN_WIDTH, highlight=False)


def wanted_files(contents: Mapping[str, bytes], what: tuple[str, ...]) -> list[str]:
    """The files of an artifact that `show` was asked for."""
    if what[0] in ("ir", "schedule") and len(what) == 1:
        return sorted(name for name in contents if name.startswith(f"{what[0]}/"))
    kernels = [Path(name).stem for name in contents if re.fullmatch(r"kernels/[a-z]\w*\.py", name)]
    if what[0] == "kernel":
        if len(what) == 2 and what[1] in kernels:
            return [f"kernels/{what[1]}.py"]
        raise UsageError("name one kernel", do=f"kernels: {', '.join(sorted(kernels))}")
    if len(what) == 1 and what[0] in contents:
        return [what[0]]
    raise UsageError(
        f"the plan holds no {' '.join(what)!r}",
        do="ask for plan, report, ir, schedule, kernel NAME or one of "
        + ", ".join(sorted(contents)),
    )


def as_text(data: bytes, name: str) -> str:
    """A file of an artifact as text; cubins are none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError("not text", where=name, do="open it with a disassembler") from error


def print_source(text: str, name: str) -> None:
    """Source text on stdout, highlighted by its file name's suffix where stdout is a terminal."""
    if not sys.stdout.isatty():
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, _lexer(name), theme="ansi_dark", background_color="default"))


def _lexer(name: str) -> Lexer:
    from pygments.lexers import get_lexer_for_filename
    from pygments.lexers.special import TextLexer
    from pygments.util import ClassNotFound

    if name.endswith(".mir"):
        return _mir_lexer()
    try:
        return get_lexer_for_filename(name)
    except ClassNotFound:
        return TextLexer()


def _mir_lexer() -> Lexer:
    """The text form of the IR (docs/ir.md): keywords, %values, @functions, ops, types."""
    from pygments import token
    from pygments.lexer import RegexLexer

    rules = [
        (r"#.*", token.Comment),
        (r'"[^"]*"', token.String),
        (r"\b(module|func|program|return)\b", token.Keyword),
        (r"%[\w.]+", token.Name.Variable),
        (r"@\w+", token.Name.Function),
        (r"\b(bf16|f8e4m3|f16|f32|f64|i32|i64)\b", token.Keyword.Type),
        (r"(?<== )\w+", token.Name.Builtin),
        (r"-?\d+(\.\d+)?(e-?\d+)?", token.Number),
        (r"\w+", token.Name),
        (r"\s+|.", token.Text),
    ]
    lexer = type("MirLexer", (RegexLexer,), {"tokens": {"root": rules}})
    return cast("Lexer", lexer())


def report(error: MnemocError, *, as_json: bool) -> None:
    """The error as one sentence on stderr, and as an object on stdout where a machine reads."""
    print(f"mnemoc: {error}", file=sys.stderr)
    if not as_json:
        return
    body: dict[str, object] = {"error": str(error), "exit_code": error.exit_code}
    if isinstance(error, Infeasible):
        about = ("binding", "nearest", "frontier")
        body |= {name: to_json(getattr(error, name)) for name in about}
    print(json.dumps(body, indent=2))


def stdout_is_gone() -> bool:
    """Whether whoever read our output has closed it (`mnemoc show plan | head`)."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence_stdout() -> None:
    """Let the interpreter's last flush of stdout go nowhere, instead of complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
