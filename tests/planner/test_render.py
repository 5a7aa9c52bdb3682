"""The human output: one screen that holds what the plan says."""

import io
from pathlib import Path

from mnemoc.artifact import Workload
from mnemoc.planner import make_plan
from mnemoc.planner.render import render_plan
from rich.console import Console

from .conftest import small_cluster, small_model

WORKLOAD = Workload(9000, 3.0, 0.2, 64, 2)


def screen(out: Path | None, width: int = 110) -> str:
    plan = make_plan(small_model(), small_cluster(), WORKLOAD).plan
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_plan("tiny", "small", WORKLOAD, plan, out))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_screen_says_what_was_decided_why_and_what_next() -> None:
    text = screen(Path("my-plan"))
    for words in (
        "TP",
        "SPP",
        "KVP",
        "TTFT",
        "TBT",
        "memory",
        "room",
        "decodes at once",
        "chunk",
        "instead",
        "why not",
        "binds",
    ):
        assert words in text, words
    assert "mnemoc serve my-plan --weights DIR" in text
    assert "Proven optimal in gpus" in text
    assert "-o DIR" in screen(None)


def test_the_screen_names_helix() -> None:
    pins = {"tp": 1, "spp": 2, "kvp": 2, "ffn": "helix"}
    plan = make_plan(small_model(), small_cluster(), WORKLOAD, pinned=pins).plan
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(render_plan("tiny", "small", WORKLOAD, plan, None))
    assert isinstance(console.file, io.StringIO)
    assert "2 KVP   FFN over TP × KVP (helix)" in console.file.getvalue()


def test_it_stays_one_screen() -> None:
    lines = screen(None).splitlines()
    assert len(lines) <= 45
    assert all(len(line) <= 110 for line in lines)
    assert all(len(line) <= 80 for line in screen(None, width=80).splitlines())
