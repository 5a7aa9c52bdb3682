"""What the command line's options mean: their types, and the groups that commands share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .artifact import CONTIGUOUS, FP8, NCCL, NEVER_HALVED, PRECISIONS
from .console import Progress, remark
from .errors import BadInput, UsageError
from .layout import FFN_MODES
from .runtime.scheduling.policies import DEFAULT, POLICIES
from .units import parse_count, parse_duration_s

if TYPE_CHECKING:
    from .planner import Cluster

EMITTABLE = ("ir", "plan", "kernels", "schedule")
OBJECTIVES = ("gpus", "ttft", "throughput")
ENGINES = ("vllm", "sglang", "trtllm")
AXES = ("tp", "spp", "kvp")

folder = click.Path(path_type=Path)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
weights_option = click.option(
    "--weights", type=folder, required=True, metavar="DIR", help="Hugging Face model folder."
)


calibrate_option = click.option(
    "--calibrate/--no-calibrate",
    default=True,
    envvar="MNEMOC_CALIBRATE",
    help="Measure this machine first, once, where --cluster local has no figures of it (20 s).",
)


eager_option = click.option(
    "--enforce-eager", is_flag=True, help="Launch kernels one by one, not by CUDA graphs."
)


def precision_options(command: Callable[..., None]) -> Callable[..., None]:
    """--quantization fp8 and --kv-cache-dtype fp8, as vLLM and SGLang name them."""
    weights = click.option(
        "--quantization", type=click.Choice([FP8]), help="Products of layers in fp8 (W8A8)."
    )
    cache = click.option(
        "--kv-cache-dtype",
        type=click.Choice(PRECISIONS),
        default="auto",
        show_default=True,
        help="auto: the model's own.",
    )
    return weights(cache(command))


def measure_if_local(cluster: str, wanted: bool, progress: Progress) -> None:
    """Measure this machine quickly if plans are asked for it and no file holds its figures."""
    from .planner import measured_path

    if wanted and cluster == "local" and not measured_path().exists():
        from .calibration import calibrate

        remark(f"measuring this machine once, for {measured_path()} (--no-calibrate plans without)")
        _, measured = calibrate(None, progress, quick=True)
        warn_if_disturbed(measured)


def warn_if_disturbed(measured: Cluster) -> None:
    """Say so where a machine was not idle while it was measured."""
    from .planner import CALIBRATED

    source = measured.numbers["memory.bandwidth"].source
    if source != CALIBRATED:
        remark(f"{source}: predictions are less sure; run `mnemoc calibrate` when it is idle")


policy_option = click.option(
    "--policy",
    type=click.Choice(tuple(POLICIES)),
    default=DEFAULT.name,
    show_default=True,
    help="Whose prompt goes first.",
)
trace_option = click.option(
    "--trace-out",
    type=folder,
    metavar="FILE",
    help="Write what the engine did, for Perfetto: .json or .json.gz.",
)


def prompt_options(command: Callable[..., None]) -> Callable[..., None]:
    """--prompt TEXT or --prompt-file FILE."""
    file = click.option("--prompt-file", type=folder, metavar="FILE", help="UTF-8; - is stdin.")
    return click.option("--prompt", metavar="TEXT")(file(command))


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Who may ask a server and how much of it, as one `limits`."""

    @click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        envvar="MNEMOC_API_KEY",
        metavar="KEY",
        help="Answer only who sends one of these; a file or MNEMOC_API_KEY does not show it in ps.",
    )
    @click.option(
        "--api-key-file", type=folder, metavar="FILE", help="More of them, one on each line."
    )
    @click.option(
        "--max-body",
        callback=count,
        metavar="BYTES",
        help="Largest body of a request: 64M.  [default: 16 for each token of the context]",
    )
    @click.option(
        "--body-timeout",
        callback=duration,
        default="10s",
        show_default=True,
        metavar="TIME",
        help="For a body to come, beside what its size takes at 64 KiB/s.",
    )
    @click.option(
        "--max-concurrency",
        callback=count,
        default="4096",
        show_default=True,
        metavar="N",
        help="Completions at work at once, streams among them.",
    )
    @click.option(
        "--max-queue",
        callback=count,
        default="4096",
        show_default=True,
        metavar="N",
        help="Answers that wait for the engine, before more are sent away.",
    )
    @click.option(
        "--send-timeout",
        callback=duration,
        default="5min",
        show_default=True,
        metavar="TIME",
        help="For a client to take what is sent to it, before its connection ends.",
    )
    @functools.wraps(command)
    def limited(
        *,
        api_keys: tuple[str, ...],
        api_key_file: Path | None,
        max_body: int | None,
        body_timeout: float,
        max_concurrency: int,
        max_queue: int,
        send_timeout: float,
        **others: object,
    ) -> None:
        from .runtime.server import Limits

        keys = (*api_keys, *keys_of(api_key_file))
        limits = Limits(keys, max_body, body_timeout, max_concurrency, max_queue, send_timeout)
        command(limits=limits, **others)

    return limited


def keys_of(file: Path | None) -> list[str]:
    if file is None:
        return []
    keys = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not keys:
        raise BadInput("no key in it", where=file, do="write one on each line")
    return keys


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt's text, of the two ways to give one."""
    if (text is None) == (file is None):
        raise UsageError("give one of --prompt and --prompt-file")
    if text is not None:
        return text
    if str(file) == "-":
        return sys.stdin.read()
    assert file is not None
    return read_text(file)


def read_text(file: Path) -> str:
    """A file's text, or a sentence that says why not."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read: {error.strerror}", where=file) from error
    except UnicodeDecodeError as error:
        raise BadInput("not UTF-8 text", where=file) from error


def count(_context: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A positive count: 4096, 128K, 10M."""
    return None if value is None else parse_count(value, param.opts[0])


def chunk_size(_context: click.Context, param: click.Parameter, value: str) -> int | None:
    """A positive count, or None for auto."""
    return None if value == "auto" else parse_count(value, param.opts[0])


def duration(_context: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A positive duration with its unit: 400s, 30ms."""
    return None if value is None else parse_duration_s(value, param.opts[0])


def pins(
    _context: click.Context, param: click.Parameter, value: str | None
) -> dict[str, int | str]:
    """What of the layout to pin of tp=8,spp=4,kvp=4,ffn=helix,stripe=64K,overlap=256,all_reduce=nccl."""
    result: dict[str, int | str] = {}
    for item in value.split(",") if value else ():
        axis, _, text = item.strip().partition("=")
        pinned = _pin(axis, text, f"{param.opts[0]} {axis}")
        if axis in result or pinned is None:
            raise UsageError(
                "not a layout",
                where=param.opts[0],
                got=value,
                do=f"write tp=8,spp=4,kvp=4 and, if you like, ffn={' or ffn='.join(FFN_MODES)}, "
                f"stripe=64K or stripe={CONTIGUOUS}, overlap=256 or overlap={NEVER_HALVED}, and "
                f"all_reduce={NCCL}",
            )
        result[axis] = pinned
    return result


def _pin(axis: str, text: str, what: str) -> int | str | None:
    """One item's value; None if it is none."""
    if axis in AXES:
        return int(text) if text.isdecimal() and int(text) > 0 else None
    names = {
        "ffn": FFN_MODES,
        "stripe": (CONTIGUOUS,),
        "overlap": (NEVER_HALVED,),
        "all_reduce": (NCCL,),
    }.get(axis, ())
    if axis in ("stripe", "overlap") and text and text not in names:
        return parse_count(text, what)
    return text if text in names else None


def emitted(_context: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Stages of the flow to write: ir,plan,kernels,schedule or a part of it."""
    stages = tuple(value.split(",")) if value else ()
    if unknown := [stage for stage in stages if stage not in EMITTABLE]:
        known = ", ".join(EMITTABLE)
        raise UsageError(
            f"unknown stage {unknown[0]!r}", where=param.opts[0], do=f"stages: {known}"
        )
    return stages
