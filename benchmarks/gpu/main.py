"""Measures the kernels and programs that plans emit on this GPU; see docs/measuring.md."""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import os
import random
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = (
    *("ceilings", "compile", "correctness", "prefill", "decode"),
    *("rows", "calibrate", "stage", "tiles"),
)
GRACE_S = 60
"""After the budgets of all sections: what hangs then is stopped, with a traceback that says where."""


def main(words: Sequence[str]) -> int:
    """Runs the asked sections; 0 if no case failed, 1 if one did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--sections", default=",".join(NAMES), help="of " + ",".join(NAMES))
    parser.add_argument("--again", action="store_true", help="also what is finished")
    parser.add_argument("--publish", action="store_true", help="copy to benchmarks/results/")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, interpreted")
    parser.add_argument("--small", action="store_true", help="the rehearsal's sizes, on the GPU")
    parser.add_argument(
        "--tiles", type=Path, metavar="FILE", help="a cluster file whose [tiles] to measure with"
    )
    parser.add_argument("--compile-share", metavar="I/N", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help="plan anew what `stage` replays")
    asked = parser.parse_args(words)
    if asked.prepare:
        from .plans import prepare

        prepare()
        return 0
    if asked.out is None:
        parser.error("--out DIR: where results go")
    names = asked.sections.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if asked.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    return _run(asked, [name for name in NAMES if name in names])


def _run(asked: argparse.Namespace, names: Sequence[str]) -> int:
    import torch
    from mnemoc import calibration_kernels

    from . import report, tiles
    from .compiling import compile_share
    from .device import Cuda, Rehearsal
    from .runner import Runner, Setup, say
    from .sections import SECTIONS
    from .sizes import FULL, TINY

    if not asked.rehearse and not torch.cuda.is_available():
        say("benchmarks.gpu: no CUDA device is here; --rehearse runs all of it on the CPU")
        return 2
    sizes = TINY if asked.rehearse or asked.small else FULL
    device = Rehearsal() if asked.rehearse else Cuda()
    out: Path = asked.out
    arch = device.target.partition(":")[2]
    table = calibration_kernels.tiles_of(asked.tiles, arch) if asked.tiles else None
    if asked.compile_share:
        small = dataclasses.replace(sizes, pool_share=min(0.002, sizes.pool_share))
        return compile_share(Setup(device, small, out, table), asked.compile_share)
    faulthandler.dump_traceback_later(
        sum(sizes.budgets[name] for name in names) + GRACE_S, exit=True
    )
    out.mkdir(parents=True, exist_ok=True)
    if asked.again:
        for name in names:
            (out / f"{name}.json").unlink(missing_ok=True)
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    random.seed(seed)
    say(f"random data of seed {seed}")
    setup = Setup(device, sizes, out, table)
    failed = Runner(setup, [SECTIONS[name] for name in names]).run()
    tiles.write_best(setup)
    path = report.write(out)
    say(path.read_text())
    if asked.publish:
        report.publish(out, out / "published" if asked.rehearse else report.RESULTS)
    faulthandler.cancel_dump_traceback_later()
    if failed:
        print(f"{failed} cases failed; see {path}", file=sys.stderr)
    return 1 if failed else 0
