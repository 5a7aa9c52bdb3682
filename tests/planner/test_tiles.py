"""[tiles] of a cluster file: read, refused, written."""

from __future__ import annotations

from pathlib import Path

import pytest
from mnemoc.errors import BadInput
from mnemoc.planner import load_cluster, write_cluster
from mnemoc.tiles import Cut, MeasuredTiles, Tile

SHIPPED = Path(load_cluster("dgx-h100").origin)
TILES = """
[tiles]
arch = "sm_90"
source = "measured: here"
[tiles.attention_prefill]
128 = { block_m = 64, block_n = 32, warps = 4, stages = 5, programs = 2, bulk = true }
[tiles.attention_decode]
128 = { block_m = 16, block_n = 64, warps = 4, stages = 3 }
[tiles.rms_norm]
4096 = { warps = 8 }
[tiles.swiglu]
14336 = { warps = 2, loads = 4 }
"""
READ = MeasuredTiles(
    "sm_90",
    "measured: here",
    {
        "attention_prefill": {128: Tile(64, 32, 4, 5, programs=2, bulk=True)},
        "attention_decode": {128: Tile(16, 64, 4, 3)},
    },
    {"rms_norm": {4096: Cut(8)}, "swiglu": {14336: Cut(2, loads=4)}},
)


def test_measured_tiles_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED.read_text() + TILES)
    cluster = load_cluster(str(path))
    assert cluster.tiles == READ
    assert cluster.describe()["tiles"]["rows"]["swiglu"]["14336"] == {"warps": 2, "loads": 4}
    assert load_cluster("dgx-h100").tiles is None
    assert "tiles" not in load_cluster("dgx-h100").describe()


def test_measured_tiles_are_written_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    written = write_cluster(
        path, name="dgx-h100", device="d", target="cuda:sm_90", figures={}, tiles=READ
    )
    assert written.tiles == READ
    assert load_cluster(str(path)) == written


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[tiles.swiglu]", "[tiles.swigloo]", "unknown key 'tiles.swigloo'; known keys here: arch"),
        ('arch = "sm_90"', 'arch = "sm_80"', "tiles.arch is not that of the cluster's target, cuda:"),
        ('arch = "sm_90"', "", "tiles.arch must be a text"),
        ('source = "measured: here"', 'source = " "', "tiles.source must be a text"),
        ("4096 =", "wide =", "a key of tiles.rms_norm is not a width (got 'wide')"),
        ("{ warps = 8 }", "{ warps = 8, loads = 2 }", "write tiles.rms_norm.4096 = { warps = ... }"),
        ("{ warps = 8 }", "8", "tiles.rms_norm.4096 must be a tile (got 8)"),
        ("warps = 8", "warps = 6", "warps of tiles.rms_norm.4096 is not a power of two up to 16"),
        ("warps = 8", "warps = true", "warps of tiles.rms_norm.4096 is not a power of two"),
        ("loads = 4", "loads = 16", "loads of tiles.swiglu.14336 is not a power of two up to 8"),
        ("stages = 5", "stages = 0", "stages of tiles.attention_prefill.128 is not 1 to 16 (got 0)"),
        ("bulk = true", "bulk = 1", "bulk of tiles.attention_prefill.128 is not true or false"),
        ("bulk = true", "bulky = true", "must be a tile"),
        ("stages = 3", "stage = 3", "tiles.attention_decode.128 must be a tile"),
        ("block_m = 16", "block_m = 8", "tiles.attention_decode.128 has a block of less than 16"),
    ],
)  # fmt: skip
def test_wrong_tiles_are_refused_in_one_sentence(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    assert TILES.count(old) == 1
    path.write_text(SHIPPED.read_text() + TILES.replace(old, new))
    with pytest.raises(BadInput) as caught:
        load_cluster(str(path))
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
