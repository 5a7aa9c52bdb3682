"""Measuring this machine: real figures in a cluster file, and what spoils them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mnemoc.calibration import calibrate, rising, source_of
from mnemoc.calibration_gpu import calibrate_gpu, shipped_name, write
from mnemoc.errors import BadInput
from mnemoc.ir.model import load_model
from mnemoc.layout import Layout
from mnemoc.planner import CALIBRATED, Cluster, Configuration, forecast, load_cluster
from mnemoc.planner.evidence import kind
from mnemoc.runtime.measuring.others import Watch
from mnemoc.runtime.measuring.probes_gpu import Figures


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cluster, list[float]]:
    """This machine, and the shares that were reported while it was measured."""
    shares: list[float] = []
    path, cluster = calibrate(
        tmp_path_factory.mktemp("calibrated") / "here.toml",
        lambda what, share, eta_s: shares.append(share),
        quick=True,
    )
    assert load_cluster(str(path)) == cluster
    return cluster, shares


def test_a_machine_is_measured_with_the_kernels_of_a_plan(
    measured: tuple[Cluster, list[float]],
) -> None:
    cluster, shares = measured
    assert shares == sorted(shares)
    assert shares[-1] <= 1
    for key, least, most in (
        ("peak.float32", 1e9, 1e13),
        ("memory.bandwidth", 1e9, 1e12),
        ("memory.shared_bandwidth", 1e9, 1e13),
        ("links.intra.bandwidth", 1e7, 1e11),
        ("host.bandwidth", 1e8, 1e12),
    ):
        assert least < cluster[key] < most
        assert CALIBRATED in cluster.numbers[key].source
    for curve in cluster.curves.values():
        shares_by_size = [share for _, share in curve.points]
        assert shares_by_size == sorted(shares_by_size)


def test_what_is_measured_predicts(measured: tuple[Cluster, list[float]]) -> None:
    cluster, _ = measured
    said = forecast(load_model("tiny-llama"), cluster, Configuration(Layout(1, 1, 1), 4096))
    assert 0.01 < said.ttft.seconds < 60
    assert 1e-4 < said.tbt.seconds < 1


def test_rates_that_fall_are_averaged() -> None:
    assert rising([(1, 2.0), (2, 8.0), (4, 6.0), (8, 10.0)], best=10.0) == [
        (1, 0.2),
        (2, 0.7),
        (4, 0.7),
        (8, 1.0),
    ]


def test_another_program_at_work_is_noticed() -> None:
    watch = Watch()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        assert watch.others() > 0.3
    finally:
        busy.kill()
        busy.wait()


def test_a_disturbed_measurement_says_so_and_counts_for_no_more_than_an_assumption() -> None:
    cores = os.cpu_count() or 1
    assert source_of(0.01 * cores) == CALIBRATED
    disturbed = source_of(0.5 * cores)
    assert CALIBRATED in disturbed
    assert kind(CALIBRATED) == "measured"
    assert kind(disturbed) == "assumed"


def test_our_own_work_is_not_taken_for_that_of_others() -> None:
    own = [sys.executable, "-c", "sum(range(10**8))"]
    kept_busy = []
    for _ in range(3):  # others may really be at work: the least counts
        watch = Watch()
        subprocess.run(own, check=True)
        kept_busy.append(watch.others())
    assert min(kept_busy) < 0.5


def test_a_gpu_takes_the_place_of_what_one_gpu_can_tell(tmp_path: Path) -> None:
    measured = Figures(
        peak_flops=8e14,
        peak_fp8_flops=1.5e15,
        bandwidth=3e12,
        matmul=[(256, 4e14), (8192, 8e14)],
        matmul_fp8=[(256, 5e14), (8192, 1.2e15)],
        attention_prefill=[(128, 3e14), (8192, 6e14)],
        attention_decode=[(1e6, 5e11), (1e9, 2.7e12)],
        memory=[(1e6, 1e12), (1e8, 2.5e12)],
        host=[(1e6, 2e10), (1e9, 5e10)],
        launch_s=5e-6,
        gap_s=1e-6,
    )
    found = write(tmp_path / "h100.toml", "dgx-h100", "NVIDIA H100 80GB HBM3", 80 << 30, measured)
    shipped = load_cluster("dgx-h100")
    assert found["peak.bfloat16"] == 8e14
    assert found.curve("attention_prefill").points == ((128, 0.375), (8192, 0.75))
    assert kind(found.curves["memory"].source) == "measured"
    assert found.device == "NVIDIA H100 80GB HBM3"
    for size, rate in ((1e6, 2e10), (1e9, 5e10)):
        took_s = found["host.latency"] + size / found["host.bandwidth"]
        assert size / took_s == pytest.approx(rate, rel=0.01)
    for kept in ("links.inter.bandwidth", "host.memory", "devices_per_node", "memory.reserve"):
        assert found.numbers[kept] == shipped.numbers[kept]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_none_is_measured() -> None:
    with pytest.raises(BadInput, match="no CUDA device"):
        calibrate_gpu(None)


def test_a_gpu_of_no_shipped_kind_is_refused() -> None:
    assert shipped_name("NVIDIA H200") == "dgx-h200"
    with pytest.raises(BadInput, match="no shipped cluster"):
        shipped_name("NVIDIA GeForce RTX 4090")
