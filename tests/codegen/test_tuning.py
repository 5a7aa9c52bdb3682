"""From candidates to a cluster file's [tiles] to a plan's kernels; clocks are made up."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mnemoc import calibration_gpu, calibration_kernels, pipeline
from mnemoc.artifact import Workload
from mnemoc.codegen.aot import REPORT
from mnemoc.codegen.kernels import KernelSpec, render_kernels
from mnemoc.codegen.providers import OPS, OURS
from mnemoc.codegen.tiles import TILES, refreshed
from mnemoc.codegen.tuning import MARGIN, Candidate, best, fits, neighbours, today, with_candidate
from mnemoc.errors import BadInput
from mnemoc.planner import load_cluster, write_cluster
from mnemoc.runtime.measuring.probes_gpu import Sizes as ProbeSizes
from mnemoc.runtime.measuring.probes_providers import Points
from mnemoc.tiles import Cut, MeasuredTiles, Tile
from mnemoc.tuning import Attended, Search, Sizes, refresh

NOTHING = MeasuredTiles("sm_90", "measured: here", {}, {})
PREFILL, DECODE = OPS
CPU = torch.device("cpu")
WIDTHS = {
    **{"rms_norm": (384,), "swiglu": (640,), "rope_append": (64,)},
    **{"merge": (64,), "quantize": (512,), "swiglu_fp8": (640,)},
}
SIZES = Sizes(
    attention={
        "attention_prefill": (Attended(4, 2, 8, (40,)),),
        "attention_decode": (Attended(4, 1, 1, (70, 3)),),
    },
    widths=WIDTHS,
    counts=(3,),
    cold=1,
)


def small_spec(page_size: int = 64) -> KernelSpec:
    return KernelSpec(
        target="cuda:sm_90",
        dtype="float16",  # the interpreter's products of bfloat16 are wrong
        hidden=256,
        num_heads=4,
        num_kv_heads=2,
        merged_heads=4,
        head_dim=64,
        ffn=512,
        page_size=page_size,
        norm_eps=1e-5,
        qk_norm=False,
        inv_freq=(1.0,) * 32,
        attention_factor=1.0,
    )


def small_search(race: Callable[[Mapping[str, Sequence[Any]]], Mapping[str, float]]) -> Search:
    tiles = dataclasses.replace(TILES["sm_90"], sms=2)
    return Search(small_spec(), tiles, SIZES, CPU, race)


# ------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("arch", TILES)
@pytest.mark.parametrize("page", [16, 64])
def test_neighbours_differ_in_one_thing_and_would_be_taken(arch: str, page: int) -> None:
    tiles = TILES[arch]
    places = [("attention_prefill", 128), ("attention_decode", 64)]
    for module, width in [*places, ("rms_norm", 8192), ("swiglu", 14336), ("merge", 128)]:
        now = today(tiles, module, width, page)
        found = neighbours(now, page)
        assert found
        for one in found:
            changed = [k for k, v in vars(now.entry).items() if vars(one.entry)[k] != v]
            assert len(changed) == 1
            assert today(with_candidate(tiles, one), module, width, page) == one


@pytest.mark.parametrize("module", WIDTHS)
def test_todays_cut_is_the_one_that_is_rendered(module: str) -> None:
    spec = dataclasses.replace(small_spec(), hidden=384, ffn=640, fp8=True, merged_heads=8)
    tiles = TILES["sm_90"]
    (width,) = WIDTHS[module]
    now = today(tiles, module, width, page=64)
    same, other = with_candidate(tiles, now), with_candidate(tiles, neighbours(now, 64)[0])
    path = f"kernels/{module}.py"
    assert render_kernels(spec, same)[path] == render_kernels(spec, tiles)[path]
    assert render_kernels(spec, other)[path] != render_kernels(spec, tiles)[path]


def test_a_measured_tile_is_taken_where_it_serves() -> None:
    tile = Tile(64, 64, 4, 3, bulk=True)
    measured = dataclasses.replace(NOTHING, attention={"attention_prefill": {64: tile}})
    tiles = refreshed("sm_90", measured)
    assert today(tiles, "attention_prefill", 64, 64).entry == tile
    for head_dim, page in ((64, 16), (128, 64)):  # not its pages; not its head dim
        own = today(TILES["sm_90"], "attention_prefill", head_dim, page)
        assert today(tiles, "attention_prefill", head_dim, page) == own
    assert refreshed("sm_80", measured) == TILES["sm_80"]


def test_the_fastest_that_fits_takes_its_place_and_the_rest_stays() -> None:
    fast, unfit, slow = (Candidate("rms_norm", 4096, Cut(warps)) for warps in (1, 2, 8))
    lame = Candidate("swiglu", 512, Cut(1, 4))
    before = dataclasses.replace(
        NOTHING, rows={"merge": {128: Cut(8, 1)}, "rms_norm": {64: Cut(1)}}
    )
    shares: dict[Candidate, list[float | None]] = {
        **{fast: [0.9, 0.9], unfit: [0.5, 0.5], slow: [1.1, 0.95]},
        lame: [0.1, None],  # it does not run on all
        Candidate("swiglu", 512, Cut(1, 1)): [MARGIN],
    }
    found = best(before, shares, lambda one: one != unfit)
    assert found.rows == {"merge": {128: Cut(8, 1)}, "rms_norm": {64: Cut(1), 4096: Cut(1)}}
    assert best(before, shares, lambda one: False) == before


# ------------------------------------------------------------------------------------- the search


@pytest.mark.slow
def test_every_candidate_runs_and_what_is_said_to_be_fastest_is_found() -> None:
    """All kernels in the interpreter; the clock says that candidates of two stages or one warp are fast."""
    search = small_search(lambda runs: {})
    wanted: list[Candidate] = []

    def race(runs: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        for calls in runs.values():
            calls[0]()
        entry = wanted[0].entry
        fast = entry.stages == 3 if isinstance(entry, Tile) else entry.warps == 1
        return {"today": 1.0, "candidate": 0.5 if fast else 1.5}

    search.race = race
    shares = {}
    for candidate in search.candidates():
        wanted[:] = [candidate]
        (trial,) = search.trials(candidate)
        assert trial.note is None, candidate
        shares[candidate] = [trial.share]
    found = best(NOTHING, shares, lambda one: True)
    assert found.attention["attention_prefill"][64].stages == 3
    assert set(found.rows) == {"swiglu"} | {m for m in found.rows if found.rows[m]}
    assert {one.module for one in shares} >= {*WIDTHS, *OPS} - {"quantize"}


def test_a_candidate_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = small_search(lambda runs: {"today": 1.0, "candidate": 0.1})
    candidate = search.candidates()[0]
    load = search._load

    def wrong(spec: KernelSpec, tiles: Any, name: str) -> Any:
        module = load(spec, tiles, name)
        if tiles is search.tiles:
            return module
        return type("Wrong", (), {"prepare": staticmethod(module.prepare), name: _zeros})

    monkeypatch.setattr(search, "_load", wrong)
    (trial,) = search.trials(candidate)
    assert trial.share is None
    assert "computes something else" in str(trial.note)
    monkeypatch.setattr(search, "candidates", lambda: [candidate])
    assert refresh(search, NOTHING) == NOTHING


def _zeros(q: Any, k: Any, v: Any, launch: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    out.zero_()


@pytest.mark.slow
def test_what_holds_too_much_shared_memory_does_not_fit() -> None:
    spec = calibration_kernels.base_spec("cuda:sm_80")
    decode = Tile(16, 64, 4, 4, programs=2)  # of which each has 128 KB in flight
    assert not fits(Candidate("attention_decode", 128, decode), spec)
    assert fits(Candidate("rms_norm", 4096, Cut(4)), spec)


def test_sizes_of_a_calibration_are_those_of_the_presets() -> None:
    sizes = calibration_kernels.search_sizes("cuda:sm_90")
    assert {4096, 8192} <= set(sizes.widths["rms_norm"])
    assert {14336, 3584} <= set(sizes.widths["swiglu"])
    assert "quantize" not in calibration_kernels.search_sizes("cuda:sm_80").widths


@pytest.mark.slow
def test_a_calibration_measures_with_the_tiles_that_it_found_and_writes_all(
    tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("flash_attn_3")
    monkeypatch.setattr(Search, "fits", lambda self, candidate: candidate.module == "rms_norm")
    loaded, load = [], calibration_kernels.load_kernels

    def load_kernels(spec: KernelSpec, tiles: Any) -> Any:
        loaded.append(tiles)
        return load(spec, tiles)

    monkeypatch.setattr(calibration_kernels, "load_kernels", load_kernels)
    own = dataclasses.replace(TILES["sm_90"], sms=2)

    def race(runs: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        return {name: 0.5e-3 if name == "candidate" else 1e-3 for name in runs}

    bench = calibration_gpu.Bench("dgx-h100", "here", 80 << 30, small_spec(), own, CPU, race)
    only_rows = dataclasses.replace(SIZES, attention={}, widths={"rms_norm": (384,)})
    tiny = ProbeSizes((16,), (4096,), (4,), (64,), (64,), 1 << 12, (1,), 64, 1, launches=1)
    effort = calibration_gpu.Effort(only_rows, tiny, POINTS)
    shares: list[float] = []
    before = dataclasses.replace(NOTHING, rows={"merge": {64: Cut(8, 1)}})
    cluster = calibration_gpu.calibrate_device(
        tmp_path / "here.toml",
        bench,
        effort,
        before,
        lambda what, share, eta_s: shares.append(share),
    )
    assert cluster.tiles is not None
    assert cluster.tiles.rows == {"merge": {64: Cut(8, 1)}, "rms_norm": {384: Cut(2)}}
    assert [tiles.rows for tiles in loaded] == [cluster.tiles.rows]
    assert cluster.kernels.keys() == set(OPS)
    assert "measured" in cluster.curves["attention_decode"].source
    assert shares == sorted(shares)
    assert load_cluster(str(tmp_path / "here.toml")) == cluster
    assert calibration_kernels.tiles_of(tmp_path / "here.toml", "sm_90") == cluster.tiles
    assert calibration_kernels.tiles_of(tmp_path / "here.toml", "sm_80").rows == {}
    faster = dataclasses.replace(cluster.tiles, rows={})
    again = calibration_gpu.with_tiles(tmp_path / "there.toml", cluster, faster)
    assert again == dataclasses.replace(cluster, origin=again.origin, tiles=faster)


# ---------------------------------------------------------------------------------- into a plan


def cluster_with(tiles: MeasuredTiles, path: Path) -> Path:
    write_cluster(
        path, name="dgx-h100", device="H100", target="cuda:sm_90", figures={}, tiles=tiles
    )
    return path


def planned(cluster: Path) -> pipeline.Planned:
    workload, pinned = Workload(100_000, 60.0, 0.1), {"tp": 1, "spp": 1, "kvp": 1}
    return pipeline.plan("llama-3-8b", str(cluster), workload, gpus=1, pinned=pinned)


def compiled_as(monkeypatch: pytest.MonkeyPatch, **kernel: Any) -> None:
    """In place of the compiler: one kernel of attention, of which is said what is given."""
    emit = importlib.import_module("mnemoc.codegen.emit")  # not the function of that name
    said = {"module": "kernels.attention_prefill", "entry": "attention_prefill_kernel"}
    usual = {"spill_bytes": 0, "programs_per_sm": 2, "shared_bytes": 9, "registers": 9}
    report = json.dumps({"kernels": [said | usual | kernel]}).encode()
    monkeypatch.setattr(emit, "compile_kernels", lambda spec, sources, say: {REPORT: report})


TILE = Tile(64, 32, 4, 2, programs=2, bulk=True)
MEASURED = MeasuredTiles(
    "sm_90",
    "measured: here",
    {"attention_prefill": {128: TILE}},
    {"rms_norm": {4096: Cut(16)}, "swiglu": {14336: Cut(1, loads=4)}},
)


def test_a_plans_kernels_are_cut_by_its_cluster_files_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_as(monkeypatch)
    plan = planned(cluster_with(MEASURED, tmp_path / "mine.toml"))
    files = pipeline.dump(plan, ("kernels",))
    assert (
        "BLOCK_M, BLOCK_N = tl.constexpr(64), tl.constexpr(32)"
        in (files["kernels/attention_prefill.py"])
    )
    assert 'OPTIONS = {"num_warps": 16}' in files["kernels/rms_norm.py"]
    assert "BLOCK = tl.constexpr(14336), tl.constexpr(1024)" in files["kernels/swiglu.py"]
    shipped = dataclasses.replace(plan, cluster=load_cluster("dgx-h100"))
    own = pipeline.dump(shipped, ("kernels",))
    assert own["kernels/attention_decode.py"] == files["kernels/attention_decode.py"]
    assert own["kernels/rms_norm.py"] != files["kernels/rms_norm.py"]


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        ({"spill_bytes": 16}, "attention_prefill_kernel spills 16 bytes of registers a thread"),
        (
            {"programs_per_sm": 1, "shared_bytes": 200_000},
            "fits a multiprocessor 1 times, not 2: it takes 200000 bytes of shared memory",
        ),
    ],
)
def test_a_tile_that_does_not_fit_is_refused_in_one_sentence(
    kernel: dict[str, int], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_as(monkeypatch, **kernel)
    plan = planned(cluster_with(MEASURED, tmp_path / "mine.toml"))
    with pytest.raises(BadInput) as caught:
        pipeline.emit(plan, tmp_path / "plan")
    said = str(caught.value)
    assert "tiles.attention_prefill.128 does not fit cuda:sm_90" in said
    assert complaint in said
    assert "take it out of the cluster file" in said
    assert not (tmp_path / "plan").exists()


def test_tiles_that_leave_no_room_for_partial_results_are_refused() -> None:
    tiles = TILES["sm_90"].with_tile("attention_prefill", 64, Tile(256, 64, 8, 2, programs=16))
    with pytest.raises(BadInput, match=r"no room for the partial results.*16 programs"):
        render_kernels(small_spec(), tiles)


# -------------------------------------------------------------------------------- [kernels] speeds


@pytest.fixture(autouse=True)
def _providers_are_looked_for_anew() -> None:
    for name in [name for name, module in sys.modules.items() if "calibrate-" in str(module)]:
        del sys.modules[name]


POINTS = Points(prefill=((8, 40), (4, 24)), decode=((2, 24), (1, 40)), cold=1)


def measured_speeds(race: Any) -> dict[str, Any]:
    spec = small_spec()
    tiles = dataclasses.replace(TILES["sm_90"], sms=2)
    ours = calibration_kernels.load_kernels(spec, tiles)
    return calibration_kernels.measure_speeds(spec, ours, POINTS, CPU, race)


def second_is_twice_as_fast(runs: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    for calls in runs.values():
        calls[0]()
    return {name: 1e-3 if name == OURS else 5e-4 for name in runs}


def test_where_nobody_else_is_installed_there_is_nothing_to_choose() -> None:
    assert measured_speeds(second_is_twice_as_fast) == {}


def test_providers_are_measured_where_plans_weigh_them_and_chosen_by_it(
    tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("flash_attn")
    stand_in("flash_attn_3")
    figures = measured_speeds(second_is_twice_as_fast)
    names = {f"kernels.{op}.{name}" for op in OPS for name in (OURS, "flash_attn", "flash_attn_3")}
    assert figures.keys() == names
    points, unit, source = figures[f"kernels.{PREFILL}.flash_attn_3"]
    pairs = [4 * 20 + 10, 8 * 32 + 36]  # chunks of 4 and 8, two heads on a KV head: 8 and 16 rows
    assert [point[:2] for point in points] == [(8, 24), (16, 40)]
    assert [point[2] for point in points] == pytest.approx([4 * 64 * 4 * n / 5e-4 for n in pairs])
    assert (unit, source) == ("FLOP/s", "measured by mnemoc calibrate on this machine")
    points, unit, _ = figures[f"kernels.{DECODE}.{OURS}"]
    read = 2 * 2 * 64 * 2  # bytes of K and V of a token
    assert points == [(1, 40, pytest.approx(40 * read / 1e-3)), (2, 24, pytest.approx(48e3 * read))]
    assert unit == "B/s"
    compiled_as(monkeypatch)
    path = tmp_path / "mine.toml"
    write_cluster(path, name="dgx-h100", device="d", target="cuda:sm_90", figures=figures)
    report = pipeline.dump(planned(path), ("kernels",))["kernels/providers.json"]
    assert [one["provider"] for one in json.loads(report)] == ["flash_attn_3"] * 2


def test_a_provider_that_computes_something_else_is_left_out_and_named(
    stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("flash_attn_3")
    there = importlib.import_module("flash_attn_interface")
    real = there.flash_attn_with_kvcache

    def wrong(*given: Any, **named: Any) -> Any:
        out, *rest = real(*given, **named)
        return (out * 1.5, *rest)

    monkeypatch.setattr(there, "flash_attn_with_kvcache", wrong)
    figures = measured_speeds(second_is_twice_as_fast)
    assert figures.keys() == {f"kernels.{op}.{OURS}" for op in OPS}
    source = figures[f"kernels.{PREFILL}.{OURS}"][2]
    assert "flash_attn_3 left out: it computes something else: a relative difference" in source
