"""Cluster files: units, sources, and what is refused."""

from pathlib import Path

import pytest
from mnemoc.errors import BadInput, UsageError
from mnemoc.planner import clusters, load_cluster, measured_path, write_cluster
from mnemoc.planner.cluster_text import CURVES, FIELDS, OPTIONAL
from mnemoc.planner.space import devices_asked

SHIPPED = Path(str(load_cluster("dgx-h100").origin))


def test_the_shipped_clusters_are_those_that_were_promised() -> None:
    assert clusters() == ("dgx-a100", "dgx-b200", "dgx-h100", "dgx-h200", "local")


@pytest.mark.parametrize("name", clusters())
def test_every_shipped_number_has_a_source_and_a_base_unit(name: str) -> None:
    cluster = load_cluster(name)
    assert set(cluster.numbers) <= set(FIELDS)
    for key, quantity in cluster.numbers.items():
        assert len(quantity.source) > 8, key
        assert quantity.value >= 0, key
    assert {f"efficiency.{key}" for key in cluster.curves} | OPTIONAL >= set(CURVES)
    assert ("peak.float8" in cluster.numbers) == ("matmul_fp8" in cluster.curves)
    for key, curve in cluster.curves.items():
        assert len(curve.source) > 8, key
        assert curve.residual < 0.1, key


def test_units_become_base_units() -> None:
    h100 = load_cluster("dgx-h100")
    assert h100["memory.bandwidth"] == pytest.approx(3.35e12)
    assert h100["peak.bfloat16"] == pytest.approx(989.4e12)
    assert h100["overhead.launch_captured"] == pytest.approx(1.5e-6)
    assert h100.devices_per_node == 8


def test_what_is_unknown_is_an_error() -> None:
    with pytest.raises(BadInput, match=r"peak\.bfloat16 of this cluster is not known"):
        load_cluster("local")["peak.bfloat16"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[memory]", "[memory]\nbandwith = 3", "unknown key 'memory.bandwith'"),
        ("[links.intra]", "[links.between]\n[links.intra]", "unknown key 'links.between'"),
        ("value = 3.35", "value = -3.35", "memory.bandwidth must be positive"),
        ("value = 3.35", "value = 0", "memory.bandwidth must be positive"),
        ("value = 3.35", "value = nan", "memory.bandwidth is not a number"),
        ("value = 3.35", 'value = "auto"', "memory.bandwidth is not a number"),
        ("value = 3.35", "value = true", "memory.bandwidth is not a number"),
        ('unit = "TB/s"', 'unit = "TFLOP/s"', "memory.bandwidth has a wrong unit"),
        ("value = 0.80", "value = 1.2", "efficiency.link is a share"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, 0.9], [537e6, 0.8]]",
         "efficiency.attention_decode falls as its size grows (got '[6.7e+07, 0.9] to"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, 0.4], [67e6, 0.8]]",
         "sizes of efficiency.attention_decode do not ascend"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[537e6, 0.4], [67e6, 0.8]]",
         "sizes of efficiency.attention_decode do not ascend"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, 0.1], [70e6, 0.8]]",
         "efficiency.attention_decode jumps"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, 0.4], [537e12, 0.8]]",
         "efficiency.attention_decode has a gap"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, nan], [537e6, 0.8]]",
         "a point of efficiency.attention_decode is not a number"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, 0.4], [inf, 0.8]]",
         "a point of efficiency.attention_decode is not a number"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, 0.4], [537e6, 1.8]]",
         "efficiency.attention_decode is a share"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[67e6, 0], [537e6, 0.8]]",
         "efficiency.attention_decode must be positive"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[[-1, 0.4], [537e6, 0.8]]",
         "a size of efficiency.attention_decode must be positive"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[]", "efficiency.attention_decode has no points"),
        ("[[67e6, 0.434], [537e6, 0.819]]", "[0.4, 0.8]",
         "a point of efficiency.attention_decode is not [SIZE, SHARE]"),
        ('0.819]], unit = "B"', '0.819]], unit = "rows"',
         "efficiency.attention_decode has a wrong unit (got 'rows'); write"),
        ('matmul = { value = 0.70, unit = "1"', 'matmul = { value = 0.70, unit = "rows"',
         "efficiency.matmul has a wrong unit"),
        ("memory = {", "memory = 0.7 # {",
         "efficiency.memory must be a curve (got 0.7); write efficiency.memory = { points ="),
        ("value = 32,", "value = 2.5,", "nodes must be a whole number"),
        ("value = 3, unit", "value = 90, unit", "memory.reserve leaves nothing"),
        ("capacity = ", "# capacity = ", "key 'memory.capacity' is missing"),
        ("share = ", "# share = ", "key 'host.share' is missing; say all of [host] or nothing"),
        ('target = "cuda:sm_90"', 'target = "rocm"', "unknown target 'rocm'"),
        ('name = "dgx-h100"', "name = 3", "key 'name' must be a text"),
        ('source = "datasheet: H100 SXM, 80 GB"', 'source = " "', "memory.capacity has no source"),
        ('capacity = { value = 80, unit = "GB",', 'capacity = { value = 80,', "memory.capacity must"),
        ("[memory]", "[memory", "not valid TOML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_sentence(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    text = SHIPPED.read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(BadInput) as caught:
        load_cluster(str(path))
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).replace(str(tmp_path), "")


KERNELS = """
[kernels.attention_prefill]
triton = { points = [[128, 8192, 300], [128, 131072, 400]], unit = "TFLOP/s", source = "measured" }
[kernels.attention_decode]
anybodys = { points = [[1, 131072, 2.5]], unit = "TB/s", source = "measured" }
"""


def test_measured_speeds_of_kernels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED.read_text() + KERNELS)
    cluster = load_cluster(str(path))
    prefill = cluster.kernels["attention_prefill"]["triton"]
    assert prefill.points == ((128, 8192, 300e12), (128, 131072, 400e12))
    assert prefill.unit == "FLOP/s"
    assert cluster.kernels["attention_decode"]["anybodys"].points == ((1, 131072, 2.5e12),)
    assert cluster.describe()["kernels"]["attention_prefill"]["triton"]["source"] == "measured"
    assert load_cluster("dgx-h100").kernels == {}


def test_measured_speeds_of_kernels_are_written(tmp_path: Path) -> None:
    key, points = "kernels.attention_decode.triton", [(1, 4096, 0.5), (1, 131072, 2.5)]
    figures = {key: (points, "TB/s", "measured")}
    path = tmp_path / "mine.toml"
    written = write_cluster(path, name="dgx-h100", device="d", target="cuda:sm_90", figures=figures)
    assert written.kernels["attention_decode"]["triton"].points[1] == (1, 131072, 2.5e12)
    assert load_cluster(str(path)) == written


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("kernels.attention_prefill", "kernels.attention", "unknown key 'kernels.attention'"),
        (
            "triton = {",
            "triton = 7 # {",
            "kernels.attention_prefill.triton must be a table of speeds",
        ),
        (
            'unit = "TB/s"',
            'unit = "TFLOP/s"',
            "anybodys has a wrong unit (got 'TFLOP/s'); write it in",
        ),
        ('source = "measured"', 'source = " "', "has no source"),
        ("[[1, 131072, 2.5]]", "[]", "anybodys has no points"),
        ("[[1, 131072, 2.5]]", "[[1, 2.5]]", "is not three positive numbers (got [1, 2.5])"),
        ("[[1, 131072, 2.5]]", "[[1, 131072, -2.5]]", "is not three positive numbers"),
        (
            "[128, 131072, 400]",
            "[128, 8192, 400]",
            "points of kernels.attention_prefill.triton do not",
        ),
    ],
)
def test_wrong_speeds_of_kernels_are_refused(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    assert old in KERNELS
    path.write_text(SHIPPED.read_text() + KERNELS.replace(old, new, 1))
    with pytest.raises(BadInput) as caught:
        load_cluster(str(path))
    assert complaint in str(caught.value)


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(BadInput, match=r"unknown cluster 'dgx-9'.*dgx-h100"):
        load_cluster("dgx-9")
    with pytest.raises(BadInput, match="cannot read"):
        load_cluster("nowhere.toml")


def test_a_measured_file_replaces_the_shipped_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNEMOC_CACHE", str(tmp_path / "cache"))
    shipped = load_cluster("local")
    numbers = {"peak.float32": (71.5, "GFLOP/s", "measured: 1024 × 1024 products")}
    path = measured_path()
    written = write_cluster(path, name="local", device="this core", target="cpu", figures=numbers)
    loaded = load_cluster("local")
    assert loaded == written
    assert loaded["peak.float32"] == pytest.approx(71.5e9)
    assert loaded.numbers["peak.float32"].source.startswith("measured")
    assert loaded["memory.bandwidth"] == shipped["memory.bandwidth"]
    assert loaded.origin == str(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_measured_file_that_would_not_load_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "local.toml"
    bad = {"peak.float32": (-1.0, "GFLOP/s", "measured")}
    with pytest.raises(BadInput, match="must be positive"):
        write_cluster(path, name="local", device="d", target="cpu", figures=bad)
    assert not path.exists()


def test_more_devices_than_there_are_is_refused() -> None:
    h100 = load_cluster("dgx-h100")
    assert devices_asked(h100, nodes=16, gpus=None) == 128
    assert devices_asked(h100, nodes=None, gpus=None) == 256
    with pytest.raises(BadInput, match="264 devices are more than dgx-h100 has"):
        devices_asked(h100, nodes=33, gpus=None)
    with pytest.raises(UsageError, match="exclude each other"):
        devices_asked(h100, nodes=1, gpus=8)
