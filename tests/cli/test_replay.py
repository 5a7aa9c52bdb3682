"""`mnemoc replay`: a rank of a plan for more ranks than this machine has, through the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROMISE = ("--context", "64K", "--output-tokens", "16", "--ttft", "1h", "--tbt", "10s")
PINNED = ("--gpus", "32", "--layout", "tp=2,spp=4,kvp=4,ffn=repeated,stripe=2K")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, many_machines: Path) -> Path:
    """A plan for 32 workers on 4 machines."""
    folder = tmp_path_factory.mktemp("many")
    command = ("plan", "tiny-llama", "--cluster", many_machines, *PROMISE, *PINNED, "-o", "plan")
    words = [sys.executable, "-m", "mnemoc", *command]
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "plan"


def test_a_rank_is_measured_against_its_prediction(plan: Path, mnemoc: Any) -> None:
    ran = mnemoc("replay", plan, "--rank", 17, "--prompt", "8K", "--steps", 3, "--decodes", 1)
    assert ran.code == 0, ran.err
    assert "rank 17 of 32 (tp=2 spp=4 kvp=4): stage 2, KVP group 0, tp rank 1" in ran.out
    assert "weights random, seed 0; 8K tokens of prompt" in ran.out
    rows = [
        line.split() for line in ran.out.splitlines() if line.startswith(("  prefill", "  dec"))
    ]
    assert [row[0] for row in rows] == ["prefill"] * 3 + ["decode"]
    assert rows[-1][1:3] == ["1", "8K"]
    assert "predicted over measured: median error" in ran.out


def test_the_json_holds_every_micro_batch(plan: Path, mnemoc: Any) -> None:
    asked = ("--rank", 31, "--cached", "60K", "--chunk", 64, "--decodes", 0, "--json")
    ran = mnemoc("replay", plan, *asked)
    found = json.loads(ran.out)
    assert (found["stage"], found["group"], found["tp_rank"]) == (3, 3, 1)
    (one,) = found["micro_batches"]
    assert one["batch"] == {"kind": "prefill", "rows": 64, "cached": 60_000}
    assert one["error"] == pytest.approx(one["predicted_s"] / one["measured_s"] - 1)
    assert one["messages_s"] > 0
    assert found["median_error"] == found["worst_error"] == abs(one["error"])
    assert found["memory"]["weights_bytes"] == found["memory"]["planned"]["weights_bytes"]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--rank", 32), 2, "--rank: the plan (tp=2 spp=4 kvp=4) has no such rank"),
        (("--rank", 0, "--prompt", "65K"), 2, "--prompt: there are at most 64K tokens of context"),
        (("--rank", 0, "--weights", "nowhere"), 4, "nowhere: no such directory of weights"),
        (("--rank", 0, "--prompt", "many"), 4, "--prompt is not a positive count"),
    ],
)
def test_what_cannot_be_replayed_is_said_in_one_sentence(
    words: tuple[object, ...], code: int, sentence: str, plan: Path, mnemoc: Any
) -> None:
    ran = mnemoc("replay", plan, *words)
    assert ran.code == code
    assert sentence in ran.sentence
    assert ran.out == ""


def test_a_folder_that_is_no_plan_is_refused(tmp_path: Path, mnemoc: Any) -> None:
    ran = mnemoc("replay", tmp_path, "--rank", 0)
    assert ran.code == 4
    assert "not a plan" in ran.sentence


def test_the_rank_must_be_said(plan: Path, mnemoc: Any) -> None:
    ran = mnemoc("replay", plan)
    assert ran.code == 2
    assert "--rank" in ran.err
