"""Bad input: one sentence, the right exit code, no traceback, nothing left behind."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mnemoc.artifact import FORMAT
from mnemoc.ir.model import read_config
from mnemoc.planner import clusters

PROMISE = ("--context", "2K", "--output-tokens", "16", "--ttft", "60s", "--tbt", "1s")
LOCAL = ("--cluster", "local", *PROMISE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, its plan/ for two stages, and wide/, a model of another shape."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "wide.json").write_text(
        json.dumps(read_config("tiny-llama") | {"intermediate_size": 704})
    )
    pinned = ("--gpus", "2", "--layout", "tp=1,spp=2,kvp=1")
    commands: tuple[tuple[str, ...], ...] = (
        ("init-model", "tiny-llama", "model", "--max-shard-size", "4M"),
        ("init-model", "wide.json", "wide"),
        ("plan", "model", *LOCAL, *pinned, "-o", "plan", "--json"),
    )
    for words in commands:
        command = [sys.executable, "-m", "mnemoc", *words]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """The folder that the command ran in holds what it held before."""
    yield
    assert sorted(tmp_path.iterdir()) == [], "left behind"


def config(folder: Path, **changes: Any) -> Path:
    path = folder.parent / "config.json"
    path.write_text(json.dumps(read_config("tiny-llama") | changes))
    return path


# ------------------------------------------------------------------------------- plan: what is asked


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no such model"),
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ("{}", "key 'architectures' is missing"),
    ],
)
def test_a_missing_or_malformed_config(
    text: str | None, sentence: str, tmp_path: Path, mnemoc: Any
) -> None:
    path = tmp_path.parent / "config.json"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    ran = mnemoc("plan", path, *LOCAL, "-o", "plan")
    assert ran.code == 4
    assert str(path) in ran.sentence
    assert sentence in ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_an_unsupported_architecture_is_named_with_those_supported(
    tmp_path: Path, mnemoc: Any
) -> None:
    path = config(tmp_path, architectures=["MambaForCausalLM"])
    ran = mnemoc("plan", path, *LOCAL, "-o", "plan")
    assert ran.code == 4
    assert "'MambaForCausalLM' is not supported" in ran.sentence
    assert "Qwen3ForCausalLM" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_an_unknown_key_in_a_cluster_file(tmp_path: Path, mnemoc: Any) -> None:
    path = tmp_path.parent / "mine.toml"
    path.write_text('nickname = "fast"\n')
    ran = mnemoc("plan", "tiny-llama", "--cluster", path, *PROMISE, "-o", "plan")
    assert ran.code == 4
    assert str(path) in ran.sentence
    assert "nickname" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_an_unknown_cluster_is_answered_with_those_shipped(mnemoc: Any) -> None:
    ran = mnemoc("plan", "tiny-llama", "--cluster", "dgx-x100", *PROMISE, "-o", "plan")
    assert ran.code == 4
    assert all(name in ran.sentence for name in clusters())


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("value", ["-4s", "0s", "4", "soon", "4 parsecs", "", "nans", "1e999s"])
@pytest.mark.parametrize("option", ["--ttft", "--tbt"])
def test_a_negative_or_unparsable_duration(option: str, value: str, mnemoc: Any) -> None:
    ran = mnemoc("plan", "tiny-llama", *LOCAL, f"{option}={value}", "-o", "plan")
    assert ran.code == 4
    assert option in ran.sentence


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("value", ["-10M", "0", "many", "1.5", "10Q"])
def test_a_negative_or_unparsable_count(value: str, mnemoc: Any) -> None:
    ran = mnemoc("plan", "tiny-llama", *LOCAL, f"--context={value}", "-o", "plan")
    assert ran.code == 4
    assert "--context" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "value", ["tp=0", "tp", "tp=two", "ep=4", "tp=1,tp=2", "tp=1;spp=2", "ffn=4"]
)
def test_a_layout_that_is_none(value: str, mnemoc: Any) -> None:
    ran = mnemoc("plan", "tiny-llama", *LOCAL, "--layout", value, "-o", "plan")
    assert ran.code == 2
    assert "write tp=8,spp=4,kvp=4" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_a_tp_that_does_not_divide_the_heads(mnemoc: Any) -> None:
    ran = mnemoc(
        "plan", "llama-3-8b", "--cluster", "dgx-h100", *PROMISE, "--layout", "tp=3", "-o", "plan"
    )
    assert ran.code == 4
    assert "tp" in ran.sentence
    assert "3" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("option", ["--quantization", "--kv-cache-dtype"])
@pytest.mark.parametrize(
    ("cluster", "more", "sentence"),
    [
        ("dgx-a100", (), "gives no peak.float8"),
        ("local", ("--calibrate",), "fp8 is not for CPUs"),  # and is not measured for it
    ],
)
def test_fp8_where_there_is_none(
    cluster: str, more: tuple[str, ...], sentence: str, option: str, mnemoc: Any
) -> None:
    ran = mnemoc("plan", "tiny-llama", "--cluster", cluster, *PROMISE, option, "fp8", *more)
    assert ran.code == 4
    assert sentence in ran.sentence


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("more", [("-o", "plan"), ("--emit", "ir")])
def test_fp8_products_of_a_model_in_float32(more: tuple[str, ...], mnemoc: Any) -> None:
    asked = ("plan", "tiny-llama", "--cluster", "dgx-h100", *PROMISE, "--quantization", "fp8")
    ran = mnemoc(*asked, *more)
    assert ran.code == 4
    assert "products of fp8 come out as bf16 alone" in ran.sentence
    assert "plan without --quantization fp8" in ran.sentence
    assert mnemoc(*asked).code == 0


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("option", ["--quantization", "--kv-cache-dtype"])
def test_a_precision_that_is_none(option: str, mnemoc: Any) -> None:
    ran = mnemoc("predict", "tiny-llama", "--cluster", "dgx-h100", "--prompt", "1K", option, "int3")
    assert ran.code == 2
    assert "'int3' is not" in ran.err
    assert "fp8" in ran.err


@pytest.mark.usefixtures("nothing_left")
def test_a_checkpoint_that_is_fp8_already(tmp_path: Path, mnemoc: Any) -> None:
    path = config(tmp_path, quantization_config={"quant_method": "fp8"})
    ran = mnemoc("predict", path, "--cluster", "dgx-h100", "--prompt", "1K")
    assert ran.code == 4
    assert "quantised checkpoints are not supported (fp8)" in ran.sentence
    assert "--quantization fp8" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_more_gpus_than_the_cluster_has(mnemoc: Any) -> None:
    ran = mnemoc(
        "plan", "llama-3-8b", "--cluster", "dgx-h100", *PROMISE, "--gpus", "1000000", "-o", "plan"
    )
    assert ran.code == 4
    assert "1000000" in ran.sentence.replace(",", "")


def test_an_output_folder_that_is_no_plan_is_left_alone(tmp_path: Path, mnemoc: Any) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("dear")
    ran = mnemoc("plan", "tiny-llama", *LOCAL, "-o", "thesis")
    assert ran.code == 4
    assert "not a plan" in ran.sentence
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "chapter-1.txt"]


# ------------------------------------------------------------------------ a plan that was changed


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_noticed(
    data: st.DataObject, made: Path, mnemoc: Any
) -> None:
    files = sorted(p for p in (made / "plan").rglob("*") if p.is_file() and p.stat().st_size)
    path = data.draw(st.sampled_from(files), label="file")
    whole = path.read_bytes()
    offset = data.draw(st.integers(0, len(whole) - 1), label="offset")
    flipped = data.draw(st.integers(1, 255), label="xor")
    try:
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ flipped]) + whole[offset + 1 :])
        ran = mnemoc("show", made / "plan")
    finally:
        path.write_bytes(whole)
    assert ran.code == 4
    assert str(made / "plan") in ran.sentence


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_more_or_less_or_shorter_is_noticed(
    data: st.DataObject, made: Path, mnemoc: Any
) -> None:
    files = sorted(p for p in (made / "plan").rglob("*") if p.is_file() and p.stat().st_size)
    path = data.draw(st.sampled_from(files), label="file")
    whole = path.read_bytes()
    extra = path.with_name("extra.py")
    try:
        path.unlink()
        assert mnemoc("show", made / "plan").code == 4
        path.write_bytes(whole[:-1])
        assert mnemoc("show", made / "plan").code == 4
        path.write_bytes(whole)
        extra.write_text("print('hello')\n")
        assert mnemoc("show", made / "plan").code == 4
    finally:
        path.write_bytes(whole)
        extra.unlink(missing_ok=True)
    assert mnemoc("show", made / "plan").code == 0


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("command", ["run", "verify", "serve"])
def test_a_changed_plan_never_runs(command: str, made: Path, mnemoc: Any) -> None:
    path = made / "plan" / "cost.py"
    whole = path.read_bytes()
    path.write_bytes(whole + b"print('never')\n")
    prompt = () if command == "serve" else ("--prompt", "Hi")
    try:
        ran = mnemoc(command, made / "plan", "--weights", made / "model", *prompt)
    finally:
        path.write_bytes(whole)
    assert ran.code == 4
    assert "never" not in ran.out
    assert "changed since it was planned" in ran.sentence


def test_a_plan_of_another_format_version(made: Path, tmp_path: Path, mnemoc: Any) -> None:
    shutil.copytree(made / "plan", tmp_path / "plan")
    manifest = tmp_path / "plan" / "manifest.json"
    written = manifest.read_text()
    manifest.write_text(written.replace(f'"format": {FORMAT}', '"format": 1'))
    ran = mnemoc("show", tmp_path / "plan")
    assert ran.code == 4
    assert "format 1" in ran.sentence
    assert "plan again" in ran.sentence


def test_a_folder_that_is_no_plan(tmp_path: Path, mnemoc: Any) -> None:
    ran = mnemoc("show", tmp_path)
    assert ran.code == 4
    assert "not a plan" in ran.sentence


def test_what_a_plan_does_not_hold(made: Path, mnemoc: Any) -> None:
    assert mnemoc("show", made / "plan", "kernel").code == 2
    assert "attention_prefill" in mnemoc("show", made / "plan", "kernel", "nonsense").sentence
    assert "cost.py" in mnemoc("show", made / "plan", "../secrets").sentence


# ------------------------------------------------------------------------------- run: what is given


def run(mnemoc: Any, made: Path, *words: object, weights: str = "model") -> Any:
    return mnemoc("run", made / "plan", "--weights", made / weights, *words)


@pytest.mark.usefixtures("nothing_left")
def test_weights_that_are_not_there(made: Path, mnemoc: Any) -> None:
    ran = run(mnemoc, made, "--prompt", "Hi", weights="nowhere")
    assert ran.code == 4
    assert "nowhere" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_weights_of_another_shape(made: Path, mnemoc: Any) -> None:
    ran = run(mnemoc, made, "--prompt", "Hi", weights="wide")
    assert ran.code == 4
    assert "wide" in ran.sentence


def test_weights_that_lack_a_tensor(made: Path, tmp_path: Path, mnemoc: Any) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    lost = body["weight_map"]["model.norm.weight"]
    (tmp_path / "model" / lost).unlink()
    ran = mnemoc("run", made / "plan", "--weights", tmp_path / "model", "--prompt", "Hi")
    assert ran.code == 4
    assert lost in ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_a_prompt_longer_than_the_plans_context(made: Path, tmp_path: Path, mnemoc: Any) -> None:
    path = tmp_path.parent / "prompt.txt"
    path.write_text("x" * 2001)
    ran = run(mnemoc, made, "--prompt-file", path)
    assert ran.code == 4
    assert "2,001 tokens" in ran.sentence


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 2),
        (("--prompt", "a", "--prompt-file", "b"), 2),
        (("--prompt-file", "nowhere.txt"), 4),
        (("--prompt", ""), 4),
        (("--prompt", "Hi", "--max-tokens", "0"), 4),
    ],
)
def test_a_prompt_that_is_none(words: tuple[str, ...], code: int, made: Path, mnemoc: Any) -> None:
    ran = run(mnemoc, made, *words)
    assert ran.code == code
    assert ran.sentence


@pytest.mark.usefixtures("nothing_left")
def test_a_port_in_use(made: Path, mnemoc: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = mnemoc("serve", made / "plan", "--weights", made / "model", "--port", port)
    assert ran.code == 4
    assert str(port) in ran.sentence
