"""The main job through the command line: model, plan, look, verify, run."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mnemoc import artifact

MNEMOC = (sys.executable, "-m", "mnemoc")
LONG = ("llama-3-8b", "--cluster", "dgx-h100", "--nodes", "16", "--context", "10M", "--tbt", "30ms")
LOCAL = ("--cluster", "local", "--context", "2K", "--output-tokens", "16", "--ttft", "60s")
TWO_STAGES = ("--tbt", "1s", "--gpus", "2", "--layout", "tp=1,spp=2,kvp=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and its plan/ for two stages."""
    folder = tmp_path_factory.mktemp("made")
    commands: tuple[tuple[str, ...], ...] = (
        ("init-model", "tiny-llama", "model", "--max-shard-size", "4M"),
        ("plan", "model", *LOCAL, *TWO_STAGES, "-o", "plan", "--json"),
    )
    for words in commands:
        subprocess.run([*MNEMOC, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def timed(command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a command said, and its processor's seconds: others may be at work."""
    before = os.times()
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    used = (b - a for a, b in zip(before[2:4], after[2:4], strict=True))
    return ran, sum(used)


# ------------------------------------------------------------------------------------------- plan


def test_ten_million_tokens_are_planned_in_two_seconds_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom mnemoc.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    heavy = {'torch', 'scipy', 'networkx', 'transformers'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "plan", *LONG, "--ttft", "600s", "--json"]
    ran, seconds = timed(command)
    libraries = [sys.executable, "-c", "import click, highspy, numpy, rich, sympy"]
    most = 2.0 if seconds < 2 else 6 * timed(libraries)[1]  # of a machine that is slow just now
    assert ran.stderr.splitlines()[-1] == "[]"
    plan = json.loads(ran.stdout)
    assert plan["predicted"]["ttft_s"] <= 600
    assert plan["predicted"]["tbt_s"] <= 0.030
    layout = plan["layout"]
    assert plan["gpus"] == layout["tp"] * layout["spp"] * layout["kvp"] <= 128
    assert seconds < most


def test_the_json_says_all_that_a_machine_needs(mnemoc: Any) -> None:
    plan = json.loads(mnemoc("plan", *LONG, "--ttft", "600s", "--json").out)
    assert set(plan["layout"]) == {"tp", "spp", "kvp", "ffn"}
    assert {"start", "end", "chunk", "iteration_s"} <= set(plan["chunks"][0])
    assert {"ttft_s", "tbt_s", "throughput_tokens_per_s"} <= set(plan["predicted"])
    assert set(plan["memory"]) == {
        "weights_bytes",
        "kv_bytes",
        "activation_bytes",
        "workspace_bytes",
        "communication_bytes",
        "reserve_bytes",
        "capacity_bytes",
        "step",
        "room_kv_bytes",
        "room_step_bytes",
    }
    assert {"objective", "bound", "gap"} <= set(plan["optimality"])
    assert plan["binding"]
    assert plan["alternatives"]


def test_an_impossible_promise_exits_with_3_and_says_what_binds_and_what_would_do(
    mnemoc: Any,
) -> None:
    ran = mnemoc("plan", *LONG, "--ttft", "60s", "--json")
    assert ran.code == 3
    assert "TTFT" in ran.sentence
    assert "feasible with" in ran.sentence
    assert json.loads(ran.out)["binding"] == "ttft"


def test_the_json_says_what_else_could_be_had(mnemoc: Any) -> None:
    plan = json.loads(mnemoc("plan", *LONG, "--ttft", "600s", "--pareto", "--json").out)
    assert {marginal["change"] for marginal in plan["marginals"]} == {"ttft", "tbt", "node"}
    laxer = plan["marginals"][0]
    assert laxer["ttft_s"] == 660
    assert laxer["objective"] <= laxer["before"] == plan["gpus"]
    points = plan["frontier"]["points"]
    assert len(points) > 20
    assert {"layout", "gpus", "ttft_s", "tbt_s"} == set(points[0])
    assert any(p["gpus"] == plan["gpus"] and p["layout"] == plan["layout"] for p in points)
    assert json.loads(mnemoc("plan", *LONG, "--ttft", "600s", "--json").out)["frontier"] is None


def test_fp8_is_planned_and_predicted_and_both_say_so(mnemoc: Any) -> None:
    fp8 = ("--quantization", "fp8", "--kv-cache-dtype", "fp8")
    plan = json.loads(mnemoc("plan", *LONG, "--ttft", "600s", *fp8, "--json").out)
    assert plan["precision"] == {"weights": "fp8", "kv_cache": "fp8"}
    plain = json.loads(mnemoc("plan", *LONG, "--ttft", "600s", "--json").out)
    assert plain["precision"] == {"weights": "auto", "kv_cache": "auto"}
    assert plan["gpus"] <= plain["gpus"]
    printed = mnemoc("plan", *LONG, "--ttft", "600s", *fp8, "--emit", "plan").out
    assert '"kv_cache": "fp8"' in printed
    printed = mnemoc("plan", *LONG, "--ttft", "600s", "--kv-cache-dtype", "fp8", "--pareto").out
    assert "bfloat16 with fp8 KV cache" in printed
    assert "add -o DIR" in printed
    asked = ("predict", "llama-3-8b", "--cluster", "dgx-h200", "--prompt", "100K", *fp8)
    assert "bfloat16 with fp8 weights and KV cache" in mnemoc(*asked).out
    said = json.loads(mnemoc(*asked, "--json").out)
    assert said["configuration"]["precision"] == {"weights": "fp8", "kv_cache": "fp8"}
    assert said["dtype"] == "bfloat16"


def test_the_frontier_is_printed_where_it_is_asked_for_and_marks_the_plan(mnemoc: Any) -> None:
    printed = mnemoc("plan", *LONG, "--ttft", "600s", "--pareto").out
    assert "promised" in printed
    assert "●" in printed
    assert "least TTFT" not in mnemoc("plan", *LONG, "--ttft", "600s").out


def test_an_impossible_promise_still_gets_its_frontier(mnemoc: Any) -> None:
    ran = mnemoc("plan", *LONG, "--ttft", "60s", "--pareto")
    assert ran.code == 3
    assert "least TTFT" in ran.out
    body = json.loads(mnemoc("plan", *LONG, "--ttft", "60s", "--pareto", "--json").out)
    assert body["frontier"]["points"]
    assert body["nearest"][0]["relaxed"] == ["ttft"]
    assert body["nearest"][0]["ttft_s"] > 60


def test_the_human_plan_is_one_screen(mnemoc: Any) -> None:
    ran = mnemoc("plan", *LONG, "--ttft", "600s")
    assert ran.code == 0
    assert len(ran.out.splitlines()) <= 50
    assert max(map(len, ran.out.splitlines())) <= 120
    assert "tp=8" in ran.out or "tp 8" in ran.out
    assert "\x1b" not in ran.out, "plain where stdout is no terminal"


@pytest.mark.parametrize("stage", ["ir", "plan", "kernels", "schedule"])
def test_every_stage_can_be_printed(stage: str, mnemoc: Any) -> None:
    ran = mnemoc("plan", "tiny-llama", *LOCAL, *TWO_STAGES, "--emit", stage)
    assert ran.code == 0
    expected = {
        "ir": "func @layer",
        "plan": '"layout"',
        "kernels": "def attention_prefill",
        "schedule": "def step(",
    }
    assert expected[stage] in ran.out
    assert not any(other in ran.out for name, other in expected.items() if name != stage)


def test_an_unknown_stage_is_a_usage_error(mnemoc: Any) -> None:
    ran = mnemoc("plan", "tiny-llama", *LOCAL, *TWO_STAGES, "--emit", "ptx")
    assert ran.code == 2
    assert "ir, plan, kernels, schedule" in ran.sentence


def test_the_same_input_gives_the_same_artifact(made: Path, tmp_path: Path, mnemoc: Any) -> None:
    for name in ("one", "two"):
        model = made / "model"
        assert mnemoc("plan", model, *LOCAL, *TWO_STAGES, "-o", tmp_path / name).code == 0
    one, two = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two


# ------------------------------------------------------------------------------------------- show


def test_show_prints_plan_ir_schedule_kernels_and_any_file(made: Path, mnemoc: Any) -> None:
    def show(*what: str) -> str:
        ran = mnemoc("show", made / "plan", *what)
        assert ran.code == 0
        assert "\x1b" not in ran.out
        return str(ran.out)

    assert show() == show("plan")
    assert "SPP" in show()
    assert "func @layer" in show("ir")
    assert show("schedule").count("def step(") == 2
    assert "def rms_norm(" in show("kernel", "rms_norm")
    assert show("cost.py") == (made / "plan" / "cost.py").read_text()


def test_show_says_where_the_report_lies_and_opens_it(
    made: Path, mnemoc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = made / "plan" / "report.html"
    ran = mnemoc("show", made / "plan", "report")
    assert (ran.code, ran.out) == (0, f"{page}\n")
    assert "--open" in ran.err
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    ran = mnemoc("show", made / "plan", "report", "--open")
    assert (ran.code, ran.out, ran.err) == (0, f"{page}\n", "")
    assert opened == [page.resolve().as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    ran = mnemoc("show", made / "plan", "report", "--open")
    assert ran.code == 2
    assert str(page) in ran.sentence
    ran = mnemoc("show", made / "plan", "ir", "--open")
    assert ran.code == 2
    assert "report --open" in ran.sentence


@pytest.mark.parametrize(
    ("file", "word"), [("schedule/stage_0.py", "def step("), ("ir/planned.mir", "func @layer")]
)
def test_a_terminal_gets_colours(file: str, word: str, made: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*MNEMOC, "show", str(made / "plan"), file]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=theirs, env=env)
    os.close(theirs)
    pieces = []
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    os.close(ours)
    assert process.wait(timeout=30) == 0
    shown = b"".join(pieces).decode()
    assert "\x1b[" in shown
    assert word in re.sub(r"\x1b\[[0-9;]*m", "", shown)


# ------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_a_plan_is_exported_to_stdout_a_file_or_json(
    engine: str, made: Path, tmp_path: Path, mnemoc: Any
) -> None:
    words = ("export", made / "plan", "--to", engine)
    text = mnemoc(*words).out
    assert "cannot express" in text
    ran = mnemoc(*words, "-o", "out")
    assert ran.code == 0
    assert (tmp_path / "out").read_text() == text
    assert os.access(tmp_path / "out", os.X_OK) == text.startswith("#!")
    body = json.loads(mnemoc(*words, "--json").out)
    assert body["text"] == text
    assert body["engine"] == engine
    assert {"what", "why"} == set(body["gaps"][0])


def test_exports_refuse_unknown_engines_no_plans_and_unwritable_files(
    made: Path, tmp_path: Path, mnemoc: Any
) -> None:
    assert mnemoc("export", made / "plan", "--to", "tgi").code == 2
    ran = mnemoc("export", tmp_path, "--to", "vllm")
    assert (ran.code, "not a plan" in ran.sentence) == (4, True)
    ran = mnemoc("export", made / "plan", "--to", "vllm", "-o", tmp_path / "no" / "out")
    assert (ran.code, "cannot write" in ran.sentence) == (4, True)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- run and verify


def test_a_prompt_runs_and_is_held_against_the_prediction(made: Path, mnemoc: Any) -> None:
    words = ("run", made / "plan", "--weights", made / "model", "--prompt", "Hello, ")
    ran = mnemoc(*words, "--max-tokens", 8)
    assert ran.code == 0
    assert "8 generated" in ran.err
    assert "time to first token" in ran.err
    assert "time between tokens" in ran.err
    outcome = json.loads(mnemoc(*words, "--max-tokens", 8, "--json").out)
    assert outcome["text"] + "\n" == ran.out
    assert len(outcome["tokens"]) == 8
    assert outcome["prompt_tokens"] == 7
    for kind in ("measured", "predicted", "promised"):
        assert outcome[kind]["ttft_s"] > 0
        assert outcome[kind]["tbt_s"] > 0


def test_a_prompt_comes_from_a_file_or_from_stdin(made: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Hello, ")
    common = [
        *MNEMOC,
        "run",
        str(made / "plan"),
        "--weights",
        str(made / "model"),
        "--max-tokens",
        "4",
    ]
    texts = [
        subprocess.run(
            [*common, *words], input="Hello, ", capture_output=True, text=True, check=True
        ).stdout
        for words in (("--prompt-file", "prompt.txt"), ("--prompt-file", "-"))
    ]
    assert texts[0] == texts[1]
    assert texts[0].strip()


def test_a_plan_is_verified_against_the_unsharded_reference(made: Path, mnemoc: Any) -> None:
    words = ("verify", made / "plan", "--weights", made / "model", "--max-tokens", 8)
    ran = mnemoc(*words, "--prompt", "The quick brown fox. " * 20)
    assert ran.code == 0
    assert "all 8 greedy tokens agree" in ran.out
    result = json.loads(mnemoc(*words, "--json").out)
    assert result["agrees"] is True
    assert result["largest_difference"] <= 1e-4


def test_the_manifest_of_a_plan_that_the_shell_made_is_whole(made: Path) -> None:
    manifest, contents = artifact.load(made / "plan")
    assert manifest.plan.layout == artifact.Layout(1, 2, 1)
    assert "cost.py" in contents


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_plan_is_served_until_it_is_stopped_and_then_the_recording_is_whole(
    made: Path, tmp_path: Path, how: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    asked = ("--port", port, "--policy", "lars", "--no-prefix-caching", "--trace-out", "t.json")
    words = ("serve", str(made / "plan"), "--weights", str(made / "model"), *asked)
    process = subprocess.Popen([*MNEMOC, *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = iter(process.stderr.readline, "")
        assert any(f"serving on http://127.0.0.1:{port}" in line for line in said)
        body = urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30).read()
        assert json.loads(body)["data"][0]["max_model_len"] == 2000
        process.send_signal(how)
        _, rest = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in rest
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]
    assert json.loads(Path("t.json").read_text())["traceEvents"]


# ------------------------------------------------------------------------------------- init-model


def test_init_model_says_what_it_wrote(tmp_path: Path, mnemoc: Any) -> None:
    ran = mnemoc("init-model", "tiny-llama", "m", "--seed", 3)
    assert ran.code == 0
    assert ran.out == "m: LlamaForCausalLM, 12.1 MiB, seed 3\n"
    body = json.loads(mnemoc("init-model", tmp_path / "m", "again", "--json").out)
    assert body == {"directory": "again", "bytes": body["bytes"], "seed": 0}


def test_init_model_refuses_a_folder_with_something_in_it(tmp_path: Path, mnemoc: Any) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("dear")
    ran = mnemoc("init-model", "tiny-llama", "m")
    assert ran.code == 4
    assert "not empty" in ran.sentence
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "thesis.txt"]


def test_predict_prints_figures_with_bands_for_people_and_machines(mnemoc: Any) -> None:
    question = (
        "predict", "llama-3-8b", "--cluster", "dgx-h100", "--layout", "tp=8,spp=4,kvp=2",
        "--prompt", "1M", "--cached", "100K", "--output", "1K", "--concurrency", 2, "--chunk", 4096,
    )  # fmt: skip
    ran = mnemoc(*question)
    assert ran.code == 0
    assert "TTFT" in ran.out
    assert "rests on" in ran.out
    body = json.loads(mnemoc(*question, "--json").out)
    assert body["gpus"] == 64
    assert body["ttft"]["low_s"] < body["ttft"]["seconds"] < body["ttft"]["high_s"]
    assert sum(body["tbt"]["parts_s"].values()) == pytest.approx(body["tbt"]["seconds"])
    assert body["chunks"][0] == [100_000, 4096]
    assert "is dealt to 2 groups, " in ran.out
    assert body["configuration"]["stripe"] is None
    assert body["stripe_tokens"] % 64 == 0
    assert body["fits"] is True
    assert {use["figure"] for use in body["uses"]} == {"ttft", "tbt"}


def test_a_stripe_is_pinned_like_the_rest_of_a_layout(mnemoc: Any) -> None:
    """Rounded up to what chunks need not cross; contiguous, the next group joins half way."""
    stripes = []
    for stripe in ("64K", "contiguous"):
        ran = mnemoc(
            "predict", "llama-3-8b", "--cluster", "dgx-h100", "--prompt", "1M", "--json",
            "--layout", f"tp=8,kvp=2,stripe={stripe}",
        )  # fmt: skip
        stripes.append(json.loads(ran.out)["stripe_tokens"])
    assert stripes == [67_200, 500_160]


@pytest.mark.parametrize(("overlap", "rows"), [("2K", 2000), ("off", 0)])
def test_from_which_rows_on_layers_go_in_halves_is_pinned_too(
    overlap: str, rows: int, mnemoc: Any
) -> None:
    layout = f"tp=8,kvp=2,overlap={overlap}"
    words = ("--cluster", "dgx-h100", "--prompt", "1M", "--json", "--layout", layout)
    assert json.loads(mnemoc("predict", "llama-3-8b", *words).out)["overlap_rows"] == rows


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (("--layout", "tp=8,spp=2", "--cp", "2"), 2, "takes the place"),
        (("--layout", "tp=3"), 4, "does not divide"),
        (("--layout", "pp=3"), 2, "not a layout"),
        (("--layout", "kvp=2,stripe=wide"), 4, "not a positive count"),
        (("--layout", "kvp=2,stripe="), 2, "not a layout"),
        (("--layout", "stripe=64K"), 2, "stripes need kvp of at least 2"),
        (("--layout", "kvp=2,overlap=wide"), 4, "not a positive count"),
        (("--layout", "overlap=64"), 2, "overlap needs kvp of at least 2"),
        (("--chunk", "often"), 4, "not a positive count"),
        (("--cp", "1000"), 4, "needs 1000 devices"),
    ],
)
def test_predict_refuses_what_makes_no_sense(
    words: tuple[str, ...], code: int, complaint: str, mnemoc: Any
) -> None:
    ran = mnemoc("predict", "llama-3-8b", "--cluster", "dgx-h100", "--prompt", "1M", *words)
    assert ran.code == code
    assert complaint in ran.sentence
