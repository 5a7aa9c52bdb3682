"""`mnemoc simulate`: traffic through a plan, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROMISE = ("--context", "16K", "--output-tokens", "64", "--ttft", "1min", "--tbt", "1s")
PINNED = ("--gpus", "8", "--layout", "tp=2,spp=2,kvp=2,ffn=repeated,stripe=4K")
OURS = '{"time_s": %s, "prompt_tokens": %s, "output_tokens": 20, "class": "%s"}\n'


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, many_machines: Path) -> Path:
    """A plan for a machine that nobody here has."""
    folder = tmp_path_factory.mktemp("planned")
    command = ("plan", "tiny-llama", "--cluster", many_machines, *PROMISE, *PINNED, "-o", "plan")
    words = [sys.executable, "-m", "mnemoc", *command]
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "plan"


def test_a_workload_gives_a_table(plan: Path, mnemoc: Any) -> None:
    ran = mnemoc("simulate", plan, "--workload", "sharegpt", "--qps", 4, "--duration", "30s")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert ran.out.startswith("sharegpt on 8 ranks (tp=2 spp=2 kvp=2), lars-slack, seed 0\n")
    names = [line.split()[0] for line in ran.out.splitlines() if line.startswith("  ")]
    assert names == ["prompt", "<2K", "2K–8K", "all"]
    assert "MFU" in ran.out and "goodput:" in ran.out


def test_json_is_all_that_stdout_holds_and_is_the_same_again(
    plan: Path, mnemoc: Any, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(OURS % (i / 4, 200 + 900 * (i % 9), "ab"[i % 2]) for i in range(40)))
    first, again = (mnemoc("simulate", plan, "--trace", trace, "--json") for _ in range(2))
    assert first.code == 0 and first.out == again.out
    found = json.loads(first.out)
    assert found["requests"] == 40 and found["everything"]["output_tokens"] == 800
    assert [one["name"] for one in found["kinds"]] == ["a", "b"]
    other = mnemoc("simulate", plan, "--trace", trace, "--json", "--policy", "fcfs")
    assert json.loads(other.out)["policy"] == "fcfs"
    slower = mnemoc("simulate", plan, "--trace", trace, "--json", "--qps", 0.2)
    assert json.loads(slower.out)["seconds"] > 4 * found["seconds"]


def test_a_recording_is_written_beside_the_figures(plan: Path, mnemoc: Any, tmp_path: Path) -> None:
    asked = ("--workload", "sharegpt", "--duration", "5s", "--perfetto", tmp_path / "t.json")
    ran = mnemoc("simulate", plan, *asked, "--engine", "fixed-chunk")
    assert ran.code == 0, ran.err
    assert "fixed-chunk, fcfs" in ran.out
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) > 100
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]


def test_a_request_that_can_never_fit_is_refused_or_left_out(
    plan: Path, mnemoc: Any, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(OURS % (0, 100, "a") + OURS % (1, 17_000, "a"))
    refused = mnemoc("simulate", plan, "--trace", trace, "--perfetto", "t.json")
    assert refused.code == 4
    assert "line 2: the prompt has 17,000 tokens, the plan is for 16K" in refused.sentence
    assert not (tmp_path / "t.json").exists()
    ran = mnemoc("simulate", plan, "--trace", trace, "--skip-unservable")
    assert ran.code == 0 and "1 that can never fit left out" in ran.out


def test_capacity_is_searched(plan: Path, mnemoc: Any) -> None:
    asked = ("--workload", "sharegpt", "--qps", 100, "--duration", "3s", "--capacity")
    ran = mnemoc("simulate", plan, *asked)
    assert ran.code == 0, ran.err
    assert "requests/s keep 99% of their promises" in ran.out


@pytest.mark.parametrize(
    ("asked", "code", "what"),
    [
        ((), 2, "give one of --trace and --workload"),
        (("--workload", "sharegpt", "--trace", "x"), 2, "give one of"),
        (("--workload", "sharegpt", "--engine", "fixed-chunk", "--policy", "lars"), 2, "leave it"),
        (("--workload", "sharegpt", "--engine", "vllm"), 2, "whole-prefill"),
        (("--workload", "sharegpt", "--qps", "0"), 4, "--qps: the rate must lie between"),
        (("--workload", "sharegpt", "--qps", "nan"), 4, "--qps: the rate must lie between"),
        (("--workload", "sharegpt", "--qps", "1e-320"), 4, "--qps: the rate must lie between"),
        (("--workload", "sharegpt", "--duration", "0s"), 4, "--duration"),
        (("--workload", "sharegpt", "--duration", "1ms"), 4, "no requests"),
        (("--workload", "nothing"), 4, "no such workload"),
        (("--trace", "nothing"), 4, "cannot read"),
        (("--workload", "sharegpt", "--perfetto", "no/t.json"), 4, "cannot write"),
        (("--workload", "sharegpt", "--perfetto", "."), 4, "something that is not a file"),
        (("--workload", "sharegpt", "--capacity", "--perfetto", "t.json"), 2, "--capacity"),
        (("--trace", "t.json", "--perfetto", "t.json"), 2, "written over the --trace"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(
    plan: Path, mnemoc: Any, tmp_path: Path, asked: tuple[str, ...], code: int, what: str
) -> None:
    ran = mnemoc("simulate", plan, *asked)
    assert ran.code == code and what in ran.sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "known"),
    [(("--policy", "lifo"), "'lars-slack', 'lars', "), (("--seed", "-1"), "x>=0")],
)
def test_a_name_or_number_that_cannot_be_is_answered_with_those_that_can(
    plan: Path, mnemoc: Any, asked: tuple[str, ...], known: str
) -> None:
    ran = mnemoc("simulate", plan, "--workload", "sharegpt", *asked)
    assert ran.code == 2 and known in ran.err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (OURS % (0, 10, "\\ud800"), "line 1: class is not a text that can be printed"),
        (OURS % (0, 10, "a") + "\n" + OURS % (1, 10, "a"), "line 2: an empty line"),
        (OURS % ("NaN", 10, "a"), "line 1: NaN is no number"),
        (OURS % (2, 10, "a") + OURS % (1, 10, "a"), "line 2: a request comes before the one above"),
        ("TIMESTAMP,Context\n", "line 1: not a trace of a known kind"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line_and_no_figures(
    plan: Path, mnemoc: Any, tmp_path: Path, text: str, what: str
) -> None:
    (tmp_path / "trace").write_text(text)
    ran = mnemoc("simulate", plan, "--trace", "trace", "--perfetto", "t.json", "--json")
    assert ran.code == 4 and what in ran.sentence
    assert json.loads(ran.out)["exit_code"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["trace"]


def test_a_plan_of_another_format_is_refused(plan: Path, mnemoc: Any, tmp_path: Path) -> None:
    manifest = json.loads((plan / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 4}))
    ran = mnemoc("simulate", tmp_path, "--workload", "sharegpt")
    assert ran.code == 4 and "plan again with this version" in ran.sentence
