"""`python -m benchmarks.gpu --rehearse`: all of it, from a bare checkout of any name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mnemoc.planner import load_cluster

ROOT = Path(__file__).parents[2]
SECTIONS = (
    *("ceilings", "compile", "correctness", "prefill", "decode"),
    *("rows", "calibrate", "stage", "tiles"),
)
pytestmark = pytest.mark.slow

LACKING = ("mnemoc", "highspy", "zmq", "fastapi", "uvicorn", "prometheus_client", "tokenizers")
"""What a bare machine has not; and no mnemoc but the checkout's own."""


class Bare:
    """A checkout whose folder is not called mnemoc, on a machine that lacks what LACKING names."""

    def __init__(self, folder: Path) -> None:
        kept = shutil.ignore_patterns(
            ".*", "tests", "docs", "results", "__pycache__", "demo", "build"
        )
        self.checkout = shutil.copytree(ROOT, folder / "some checkout", ignore=kept)
        self.out = folder / "out"
        lacking = folder / "lacking"
        lacking.mkdir()
        for name in LACKING:
            (lacking / f"{name}.py").write_text("raise ImportError(__name__)\n")
        self.env = os.environ | {
            "PYTHONPATH": str(lacking),
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(self.out), *words]
        return subprocess.run(
            command, cwd=self.checkout, env=self.env, capture_output=True, text=True, check=False
        )

    def read(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / f"{section}.json").read_text())
        return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    bare = Bare(tmp_path_factory.mktemp("bare"))
    done = bare.run("--rehearse", "--publish")
    assert done.returncode == 0, done.stderr[-3000:]
    return bare


def test_every_section_measures_every_case(bare: Bare) -> None:
    for section in SECTIONS:
        body = bare.read(section)
        assert body["cases"]
        assert not body["missing"]
        assert body["machine"]["rehearsal"]
        for rows in body["cases"].values():
            assert rows
            assert not [row for row in rows if "error" in row]


def test_every_kernel_is_held_against_float64(bare: Bare) -> None:
    rows = [row for rows in bare.read("correctness")["cases"].values() for row in rows]
    kernels = {row["kernel"].partition(",")[0] for row in rows}
    assert kernels >= {"attention_prefill", "attention_decode", "rms_norm", "add_rms_norm"}
    assert kernels >= {"swiglu", "rope_append", "pack", "merge"}
    assert kernels >= {"all_reduce_add", "all_reduce_add_rms_norm"}
    assert kernels >= {"rms_norm_fp8", "swiglu_fp8", "quantize_fp8"}
    assert all(row["relative_error"] < 1e-2 for row in rows if "fp8" not in row["kernel"])


def test_baselines_that_cannot_run_are_listed_with_the_reason(bare: Bare) -> None:
    rows = [row for rows in bare.read("prefill")["cases"].values() for row in rows]
    ran = {row["kernel"] for row in rows if "median_s" in row}
    assert ran >= {"ours", "SDPA flash", "cuDNN", "flex_attention"}
    notes = {row["kernel"]: row["note"] for row in rows if "median_s" not in row}
    assert "flash_attn" in notes["flash_attn 2"]


def test_stages_are_held_against_both_cluster_files(bare: Bare) -> None:
    rows = [row for rows in bare.read("stage")["cases"].values() for row in rows]
    assert {row["batch"] for row in rows} == {"prefill", "decode"}
    assert all(row["measured_s"] > 0 and row["shipped_s"] > 0 for row in rows)
    assert all(row["calibrated_s"] > 0 for row in rows)


def test_the_cluster_file_that_it_writes_is_one(bare: Bare) -> None:
    cluster = load_cluster(str(bare.out / "cluster.toml"))
    assert "measured" in cluster.numbers["peak.bfloat16"].source
    assert "measured" in cluster.curves["attention_prefill"].source
    assert (
        cluster.numbers["links.intra.bandwidth"]
        == (load_cluster("dgx-h100").numbers["links.intra.bandwidth"])
    )


def test_a_report_names_the_machine_and_what_it_is_worth(bare: Bare) -> None:
    report = (bare.out / "report.md").read_text()
    assert "figures mean nothing" in report
    assert bare.read("rows")["machine"]["cpu"] in report
    published = bare.out / "published" / "gpu-rehearsal-on-a-cpu.md"
    assert published.read_text() == report
    assert published.with_suffix(".json").exists()


def test_what_is_there_is_not_measured_again(bare: Bare) -> None:
    body = bare.read("ceilings")
    lost = body["cases"].pop("copy")
    (bare.out / "ceilings.json").write_text(json.dumps(body))
    before = (bare.out / "decode.json").read_text()
    done = bare.run("--rehearse", "--sections", "ceilings,decode")
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "to go]" in line] == [
        line for line in done.stderr.splitlines() if "ceilings: copy (1 of 3)" in line
    ]
    now = bare.read("ceilings")["cases"]
    assert {key: now[key] for key in body["cases"]} == body["cases"]
    assert now["copy"][0]["rate"] != lost[0]["rate"]
    assert json.loads(before)["cases"] == bare.read("decode")["cases"]


def test_without_a_gpu_it_says_so_in_one_line(bare: Bare) -> None:
    done = bare.run()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


def test_what_is_missing_is_named_in_one_line(bare: Bare, tmp_path: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "from benchmarks.gpu import checkout\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'triton' else found(name)\n"
        "print(checkout.missing())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=bare.checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['triton']"
