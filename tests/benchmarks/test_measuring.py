"""The arithmetic of benchmarks/gpu, its clockwork, and what it says of what it measured."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from mnemoc.planner import load_cluster

Load = Callable[[str], ModuleType]


@given(st.integers(1, 40), st.integers(0, 60))
@settings(max_examples=50)
def test_pairs_are_those_that_a_causal_chunk_sees(gpu: Load, chunk: int, past: int) -> None:
    seen = sum(key <= past + row for row in range(chunk) for key in range(past + chunk))
    assert gpu("work").chunk_pairs(chunk, past) == seen


def test_operations_are_those_of_the_two_products(gpu: Load) -> None:
    work = gpu("work")
    heads = work.Heads("any", 6, 2, 16)
    # scores of c × n by d, and outputs of c × d by n, for each query head
    products = 6 * (work.product_flops(5, 7, 16) + work.product_flops(5, 16, 7))
    assert work.attention_flops(heads, 5 * 7) == products


def test_bytes_are_those_of_the_tensors(gpu: Load) -> None:
    work = gpu("work")
    heads = work.Heads("any", 6, 2, 16)
    q, k = torch.empty(5, 6, 16).half(), torch.empty(2, 12, 16).half()
    lse = torch.empty(5, 6)
    assert work.prefill_bytes(heads, 5, 7, 2, 2) == 2 * k.nbytes + 2 * q.nbytes + lse.nbytes
    assert work.prefill_bytes(heads, 5, 7, 2, 1) == k.nbytes + 2 * q.nbytes + lse.nbytes
    assert work.decode_bytes(heads, 5, 12, 2, 2) == 10 * k.nbytes + 2 * q.nbytes + lse.nbytes


def test_bytes_of_row_wise_kernels_are_those_of_what_they_are_given_and_give(gpu: Load) -> None:
    rowwise, runner, sizes, work = gpu("rowwise"), gpu("runner"), gpu("sizes"), gpu("work")
    device = gpu("device").Rehearsal()
    setup = runner.Setup(device, sizes.TINY, Path())
    shape = sizes.TINY.shapes[0]
    kernels = rowwise.RowKernels(setup, shape)
    bytes_of = {work.name: work.bytes for work in kernels.works(4)}
    x, weight = torch.empty(4, shape.hidden).half(), torch.empty(shape.hidden).half()
    assert bytes_of["rms_norm"] == 2 * x.nbytes + weight.nbytes
    assert bytes_of["add_rms_norm"] == 4 * x.nbytes + weight.nbytes
    assert bytes_of["swiglu"] == 3 * torch.empty(4, shape.ffn).half().nbytes
    qkv, rot, _, _, slots, *_ = kernels._rope(4)
    # each value of q, k and v is read once and lies somewhere once
    assert bytes_of["rope_append"] == 2 * qkv.nbytes + rot.nbytes + slots.nbytes
    y8, scale = torch.empty(4, shape.hidden).to(torch.float8_e4m3fn), torch.empty(4, 1)
    stored = y8.nbytes + scale.nbytes
    assert bytes_of["add_rms_norm_fp8"] == 3 * x.nbytes + weight.nbytes + stored
    bytes_of = {work.name: work.bytes for work in gpu("summing").Sums(setup, shape).works(4)}
    assert bytes_of["all_reduce_add"] == 8 * x.nbytes + 2 * x.nbytes
    assert bytes_of["all_reduce_add_rms_norm"] == 8 * x.nbytes + 3 * x.nbytes + weight.nbytes
    out, lse = torch.empty(4, 4, 64).half(), torch.empty(4, 4)
    part, table = out.nbytes + lse.nbytes, torch.empty(4, 2, dtype=torch.int32)
    assert work.merge_bytes(4, 2, shape.heads, 2) == 2 * part + 2 * part + table.nbytes
    assert work.pack_bytes(4, shape.heads, 2) == 2 * part + 4 * 8


@given(st.integers(1, 300), st.integers(0, 500))
@settings(max_examples=60)
def test_blocks_for_flex_attention_hold_every_pair_once(gpu: Load, chunk: int, past: int) -> None:
    baselines = gpu("baselines")
    size, tokens = baselines.FLEX_BLOCK, past + chunk
    partial, full = baselines.flex_blocks(chunk, tokens)
    for block, (some, whole) in enumerate(zip(partial, full, strict=True)):
        rows = range(block * size, min(chunk, (block + 1) * size))
        seen = {key for row in rows for key in range(past + row + 1)}
        seen_by_all = set(range(past + rows[0] + 1))
        covered = {key for at in (*some, *whole) for key in range(at * size, (at + 1) * size)}
        assert seen <= covered
        assert {key for at in whole for key in range(at * size, (at + 1) * size)} <= seen_by_all
        assert not set(some) & set(whole)


def test_inputs_rotate_until_the_cache_has_forgotten_them(gpu: Load) -> None:
    timing = gpu("timing")
    cache = 50 << 20
    for size in (1 << 20, 10 << 20, 60 << 20, 4 << 30):
        count = timing.copies(size, cache)
        assert count * size >= timing.COLD * cache or count == timing.MOST_CALLS
        assert count == 1 or (count - 1) * size < timing.COLD * cache


class Clockwork:
    """A device on which each run takes the time that it says."""

    def ready(self, run: Callable[[], object], *, capture: bool = True) -> Any:
        return SimpleNamespace(run=run, how="said")

    def seconds(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        self.took: list[float] = []
        times = []
        for run in runs:
            self.took.clear()
            run()
            times.append(sum(self.took))
        return times


def test_contenders_take_turns_and_the_median_of_a_call_counts(gpu: Load) -> None:
    device, order = Clockwork(), []
    lasting = {"a": iter([9.0, 1.0, 3.0, 2.0]), "b": iter([9.0] + [4.0] * 6)}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            device.took.append(next(lasting[name]))

        return run

    found = gpu("timing").race(device, {"a": [call("a")], "b": [call("b"), call("b")][:1]}, 0.0)
    assert order[:4] == ["a", "b", "a", "b"]
    assert found["a"].median_s == 2.0
    assert (found["a"].least_s, found["a"].most_s, found["a"].rounds) == (1.0, 3.0, 3)
    assert found["b"].median_s == 4.0


def test_a_failed_case_is_a_row_that_says_why_and_the_rest_runs(gpu: Load, tmp_path: Path) -> None:
    runner, sizes = gpu("runner"), gpu("sizes")

    def fails() -> list[dict[str, Any]]:
        raise RuntimeError("no such page")

    setup = runner.Setup(gpu("device").Rehearsal(), sizes.TINY, tmp_path)
    cases = [runner.Case("one", fails), runner.Case("two", lambda: [{"rate": 1.0}])]
    section = runner.Section("ceilings", "Ceilings", lambda setup: cases)
    assert runner.Runner(setup, [section]).run() == 1
    found = runner.read(tmp_path, "ceilings")
    assert found == {"one": [{"error": "RuntimeError: no such page"}], "two": [{"rate": 1.0}]}
    report = gpu("report").write(tmp_path).read_text()
    assert "**RuntimeError: no such page**" in report


def test_a_section_without_time_names_what_it_did_not_reach(gpu: Load, tmp_path: Path) -> None:
    runner = gpu("runner")
    sizes = SimpleNamespace(budgets={"ceilings": -1.0})
    setup = runner.Setup(gpu("device").Rehearsal(), sizes, tmp_path)
    section = runner.Section("ceilings", "", lambda setup: [runner.Case("late", list)])
    assert runner.Runner(setup, [section]).run() == 0
    assert "Not reached in its time: late." in gpu("report").write(tmp_path).read_text()


def test_the_summary_tells_where_a_baseline_is_faster(gpu: Load) -> None:
    row = {"heads": "8B", "chunk": 32, "past": 100, "kv": "bfloat16", "share_of_peak": 0.5}
    rows = [
        row | {"kernel": "ours", "flops_per_s": 4e14, "s_per_token": 3e-6},
        row | {"kernel": "cuDNN", "flops_per_s": 5e14, "s_per_token": 2e-6},
        row | {"kernel": "ours", "chunk": 2048, "flops_per_s": 6e14, "s_per_token": 2e-6},
        row | {"kernel": "cuDNN", "chunk": 2048, "flops_per_s": 5e14, "s_per_token": 3e-6},
        row | {"kernel": "flash_attn 2", "note": "not installed"},
    ]
    told = "\n".join(gpu("report").summary({"prefill": {"cases": {"all": rows}}}))
    assert "reaches 600 TFLOP/s" in told
    assert "behind the best baseline in 1 of 2 cases, at worst at 80.0 % of it (8B, 32, 100" in told
    assert "takes 1.500 times" in told


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-70b"])
def test_programs_of_the_plans_that_are_replayed_are_emitted_anywhere(
    name: str, gpu: Load, tmp_path: Path
) -> None:
    from mnemoc.folder import load_artifact
    from mnemoc.planner import load_cluster

    plans = gpu("plans")
    asked = plans.QUESTIONS[name]
    folder = plans.emit(name, "cuda:sm_90", load_cluster("dgx-h100"), tmp_path / "plan")
    manifest, contents = load_artifact(folder)
    stage = manifest.plan.layout.coordinates(asked.rank)[0]
    role = manifest.plan.stages[stage].role
    for path in (f"schedule/{role}.py", "cost.py", "kernels/attention_prefill.py"):
        ast.parse(contents[path])
    batches = gpu("stage").micro_batches(manifest.plan, manifest.workload)
    assert {batch.kind for batch in batches} == {"prefill", "decode"}
    for batch in batches:
        rows = batch.rows if batch.kind == "prefill" else 0
        assert 0 <= batch.cached <= manifest.workload.context - rows


def test_full_sweeps_are_those_that_were_asked_for(gpu: Load) -> None:
    sizes = gpu("sizes")
    chunks = {chunk for _, chunk, _ in sizes.FULL.prefill}
    assert {32, 2048, 8192} <= chunks
    assert max(past for _, _, past in sizes.FULL.prefill) >= 1 << 20
    assert max(tokens for _, _, tokens in sizes.FULL.decode) == 4 << 20
    assert len(set(sizes.FULL.prefill)) == len(sizes.FULL.prefill)
    assert len(set(sizes.FULL.decode)) == len(sizes.FULL.decode)
    assert set(sizes.FULL.flex) <= set(sizes.FULL.prefill)
    assert sum(sizes.FULL.budgets.values()) < 8 * 60


def test_the_best_tiles_are_written_into_the_cluster_file(gpu: Load, tmp_path: Path) -> None:
    tiles, runner, sizes = gpu("tiles"), gpu("runner"), gpu("sizes")
    device = gpu("device").Rehearsal()
    setup = runner.Setup(device, sizes.TINY, tmp_path)
    tiles.write_best(setup)
    assert not (tmp_path / "cluster.toml").exists()  # nothing was timed
    candidates = tiles.search(setup).candidates()
    fast, slow = [one for one in candidates if one.module == "attention_decode"][:2]

    def row(candidate: Any, share: float) -> dict[str, Any]:
        fields = vars(candidate.entry)
        named = {"kernel": candidate.module, "width": candidate.width, "fields": fields}
        return named | {"of_today": share}

    rows = {"a": [row(fast, 0.95), row(fast, 0.9)], "b": [row(slow, 1.3)], "c": [{"error": "x"}]}
    (tmp_path / "tiles.json").write_text(json.dumps({"cases": rows}))
    tiles.write_best(setup)
    written = load_cluster(str(tmp_path / "cluster.toml"))
    assert written.tiles is not None
    assert written.tiles.attention == {"attention_decode": {fast.width: fast.entry}}
    again = runner.Setup(device, sizes.TINY, tmp_path, written.tiles)
    assert again.tiles.decode[fast.width][0] == fast.entry
    assert again.tiles.prefill == device.tiles.prefill
