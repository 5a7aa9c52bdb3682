"""The main job through the command line: model, plan, verify, run, serve."""

import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mnemoc.folder import load_artifact
from mnemoc.layout import Layout

from .conftest import LOCAL, MNEMOC, TWO_STAGES


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


def test_the_same_input_gives_the_same_artifact(made: Path, tmp_path: Path, mnemoc: Any) -> None:
    for name in ("one", "two"):
        model = made / "model"
        assert mnemoc("plan", model, *LOCAL, *TWO_STAGES, "-o", tmp_path / name).code == 0
    one, two = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two


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
    manifest, contents = load_artifact(made / "plan")
    assert manifest.plan.layout == Layout(1, 2, 1)
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
