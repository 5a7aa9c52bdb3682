"""Kernels of others: who may serve which op, who does, and that what is emitted speaks their language.

None of them runs here, for none has kernels for CPUs: `stand_in` puts in its place what has the parameters
that its documentation gives, its own checks, and attention in float64.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mnemoc import pipeline
from mnemoc.artifact import ChunkRule, Precision, Workload
from mnemoc.codegen import providers
from mnemoc.codegen.kernels import KernelSpec, render_kernels
from mnemoc.codegen.providers import OPS, OURS, PROVIDERS, Use, choose, provide, uses_of
from mnemoc.errors import BadInput
from mnemoc.layout import Layout
from mnemoc.microbatch import Segments
from mnemoc.planner import load_cluster
from mnemoc.speeds import Speeds

ROOT = Path(__file__).parents[2]
PREFILL, DECODE = OPS
WRITTEN = ("flash_attn", "flash_attn_3")


def spec(target: str = "cuda:sm_90", dtype: str = "bfloat16", page_size: int = 256) -> KernelSpec:
    return KernelSpec(
        target=target,
        dtype=dtype,
        hidden=256,
        num_heads=8,
        num_kv_heads=2,
        merged_heads=8,
        head_dim=32,
        ffn=512,
        page_size=page_size,
        norm_eps=1e-5,
        qk_norm=False,
        inv_freq=(1.0,) * 16,
        attention_factor=1.0,
    )


def plan(*, kvp: int = 1, kv_cache: str = "auto", chunks: tuple[ChunkRule, ...] = ()) -> Any:
    """What of a plan the choice looks at."""
    return SimpleNamespace(
        layout=Layout(1, 1, kvp), precision=Precision("auto", kv_cache), chunks=chunks
    )


def speeds(*points: tuple[float, float, float]) -> Speeds:
    return Speeds(points, "FLOP/s", "made up")


# --------------------------------------------------------------------------------------- who is chosen


def test_without_measurements_the_kernels_are_our_own() -> None:
    workload = Workload(1000, 1.0, 1.0)
    assert provide(spec(), plan(), workload, {}) == {}
    alone = {PREFILL: {"flash_attn_3": speeds((1, 1, 1e12))}}  # faster than what?
    choice = choose(PREFILL, spec(), plan(), [Use(1, 1, 1)], alone)
    assert (choice.provider, choice.speedup) == (OURS, 1.0)


def test_the_fastest_over_the_plans_own_chunks_is_chosen() -> None:
    tables = {
        OURS: speeds((128, 1000, 300.0), (8192, 1000, 400.0)),
        "flash_attn_3": speeds((128, 1000, 200.0), (8192, 1000, 600.0)),
    }
    large = choose(PREFILL, spec(), plan(), [Use(8192, 900, 3.0)], {PREFILL: tables})
    assert (large.provider, large.speedup) == ("flash_attn_3", pytest.approx(1.5))
    small = choose(PREFILL, spec(), plan(), [Use(100, 900, 3.0)], {PREFILL: tables})
    assert (small.provider, small.speedup) == (OURS, 1.0)
    both = [Use(128, 1000, 1.0), Use(8192, 1000, 3.0)]  # 1/300 + 3/400 against 1/200 + 3/600
    mixed = choose(PREFILL, spec(), plan(), both, {PREFILL: tables})
    assert mixed.provider == "flash_attn_3"
    assert mixed.speedup == pytest.approx((1 / 300 + 3 / 400) / (1 / 200 + 3 / 600))


def test_kernels_are_compared_only_where_all_were_measured() -> None:
    tables = {
        OURS: speeds((128, 1000, 300.0), (8192, 1000, 700.0)),
        "flash_attn_3": speeds((128, 1000, 200.0), (4096, 1000, 900.0)),
    }
    choice = choose(PREFILL, spec(), plan(), [Use(8192, 1000, 1.0)], {PREFILL: tables})
    assert choice.provider == OURS  # by the only common size, 128
    del tables[OURS]
    tables[OURS] = speeds((64, 1000, 1.0))
    choice = choose(PREFILL, spec(), plan(), [Use(8192, 1000, 1.0)], {PREFILL: tables})
    assert choice.provider == OURS


@given(
    ours=st.lists(st.floats(1, 1e3), min_size=3, max_size=3),
    theirs=st.lists(st.floats(1, 1e3), min_size=3, max_size=3),
    work=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
)
def test_a_choice_is_never_slower_than_our_own(
    ours: list[float], theirs: list[float], work: list[float]
) -> None:
    sizes = (32.0, 512.0, 4096.0)
    tables = {
        OURS: speeds(*((size, 1e5, at) for size, at in zip(sizes, ours, strict=True))),
        "flash_attn_3": speeds(*((size, 1e5, at) for size, at in zip(sizes, theirs, strict=True))),
    }
    uses = [Use(size, 1e5, w) for size, w in zip(sizes, work, strict=True)]
    choice = choose(PREFILL, spec(), plan(), uses, {PREFILL: tables})
    times = [sum(w / at for w, at in zip(work, speed, strict=True)) for speed in (ours, theirs)]
    assert choice.speedup == pytest.approx(times[0] / min(times))
    assert choice.speedup >= 1


@pytest.mark.parametrize(
    ("provider", "op", "changes", "of_plan", "reason"),
    [
        (
            "flash_attn",
            PREFILL,
            {"page_size": 64},
            {},
            "multiples of 256 tokens, the plan's have 64",
        ),
        ("flash_attn", PREFILL, {"target": "cuda:sm_100"}, {}, "no kernels for cuda:sm_100"),
        ("flash_attn_3", DECODE, {"target": "cuda:sm_80"}, {}, "no kernels for cuda:sm_80"),
        ("flash_attn_3", PREFILL, {"dtype": "float32"}, {}, "does not compute in float32"),
        ("flash_attn_3", PREFILL, {}, {"kvp": 2}, "causal on one KVP group"),
        ("flash_attn_3", DECODE, {}, {"kv_cache": "fp8"}, "queries in fp8"),
        ("torch_flash", PREFILL, {}, {}, "in one piece"),
        ("cudnn", DECODE, {}, {}, "in one piece"),
        ("flash_attn_3", DECODE, {"page_size": 16}, {"kvp": 2}, None),
        ("flash_attn", PREFILL, {"target": "cuda:sm_80"}, {}, None),
    ],
)
def test_who_cannot_serve_a_plan_is_not_chosen_and_the_reason_is_kept(
    provider: str, op: str, changes: Any, of_plan: Any, reason: str | None
) -> None:
    tables = {OURS: speeds((1, 1, 1.0)), provider: speeds((1, 1, 9.0))}
    choice = choose(op, spec(**changes), plan(**of_plan), [Use(1, 1, 1.0)], {op: tables})
    if reason is None:
        assert (choice.provider, choice.refused) == (provider, {})
    else:
        assert choice.provider == OURS
        assert reason in choice.refused[provider]


def test_a_provider_that_nobody_knows_is_refused() -> None:
    with pytest.raises(BadInput, match=r"kernels.attention_decode.magic: no such provider; known"):
        choose(DECODE, spec(), plan(), [], {DECODE: {"magic": speeds((1, 1, 1.0))}})


def test_what_a_plan_uses_its_kernels_for() -> None:
    rules = (ChunkRule(0, 1000, 256, 1, 1.0), ChunkRule(1000, 9000, 64, 1, 1.0))
    workload = Workload(3000, 1.0, 1.0, concurrency=5)
    prefill = uses_of(PREFILL, spec(), plan(chunks=rules), workload)
    assert prefill == [Use(1024, 500, 1000 * 500), Use(256, 2000, 2000 * 2000)]  # four heads on one
    assert uses_of(DECODE, spec(), plan(), workload) == [Use(5, 3000, 1.0)]


# ------------------------------------------------------------------------------------- what is emitted


def emitted(provider: str, a_spec: KernelSpec | None = None) -> dict[str, str]:
    """The files that stand in for ours where `provider` is the fastest of both ops."""
    tables = {OURS: speeds((1, 1, 1.0)), provider: speeds((1, 1, 1.25))}
    chunks = (ChunkRule(0, 1000, 256, 1, 1.0),)
    workload = Workload(1000, 1.0, 1.0)
    return provide(a_spec or spec(), plan(chunks=chunks), workload, dict.fromkeys(OPS, tables))


def test_every_provider_that_can_be_chosen_has_a_module() -> None:
    assert [name for name, provider in PROVIDERS.items() if provider.pages] == list(WRITTEN)


@pytest.mark.parametrize("provider", WRITTEN)
def test_the_modules_have_our_own_doors_and_are_formatted(
    provider: str, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    files, ours = emitted(provider), render_kernels(spec())
    report = json.loads(files.pop(providers.REPORT))
    assert [(one["op"], one["provider"], one["speedup"]) for one in report] == [
        (op, provider, 1.25) for op in OPS
    ]
    golden(f"{provider}.txt", "\n".join(f"==== {path}\n{text}" for path, text in files.items()))
    for path, text in files.items():
        assert doors(text) == doors(ours[path])
        (tmp_path / Path(path).name).write_text(text)
    for command in (["check"], ["format", "--check"]):
        words = [*command, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
        ruff = [sys.executable, "-m", "ruff", *words]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def doors(source: str) -> dict[str, list[str]]:
    """Functions that a schedule calls, with their parameters."""
    return {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in {"prepare", *OPS}
    }


@pytest.mark.parametrize("provider", WRITTEN)
def test_where_a_provider_is_missing_a_sentence_says_so(provider: str) -> None:
    package = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface"}[provider]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=r"attention_decode is by .*, which is not installed: "):
        module(emitted(provider)["kernels/attention_decode.py"])


def module(source: str) -> ModuleType:
    made = ModuleType("emitted")
    exec(compile(source, "emitted", "exec"), made.__dict__)
    return made


@pytest.mark.parametrize("provider", WRITTEN)
@pytest.mark.parametrize("op", OPS)
def test_what_a_provider_gives_is_what_our_own_kernels_give(
    provider: str, op: str, stand_in: Callable[[str], None]
) -> None:
    stand_in(provider)
    kernel = module(emitted(provider)[f"kernels/{op}.py"])
    torch.manual_seed(0)
    lengths = [300, 0, 513] if op == DECODE else [300, 20, 513]
    counts = [1, 1, 1] if op == DECODE else [40, 20, 1]
    past = [n - c for n, c in zip(lengths, counts, strict=True)]
    pages = torch.tensor([[4, 1, 0], [2, 0, 0], [5, 3, 6]], dtype=torch.int32)
    rows = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
    kv_len, before = (torch.tensor(x, dtype=torch.int32) for x in (lengths, past))
    segments = Segments(rows, kv_len, before, pages, max(counts), max(lengths))
    k, v = torch.randn(2, 2, 7, 256, 32)
    q = torch.randn(sum(counts), 8, 32)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    getattr(kernel, op)(q, k, v, kernel.prepare(segments), out, lse)
    expected_out, expected_lse = reference(q, k, v, segments)
    torch.testing.assert_close(out, expected_out.float())
    torch.testing.assert_close(lse, expected_lse.float())


def reference(q: Any, k: Any, v: Any, given: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """By the contract of `Segments`, a row at a time."""
    out, lse = torch.zeros(q.shape).double(), torch.full(q.shape[:2], -torch.inf).double()
    for s in range(given.count):
        keys, values = (cache[:, given.pages[s].long()].flatten(1, 2).double() for cache in (k, v))
        for i, row in enumerate(range(int(given.rows[s]), int(given.rows[s + 1]))):
            seen = min(int(given.kv_len[s]), int(given.past[s]) + i + 1)
            for head in range(q.shape[1] if seen > 0 else 0):
                score = keys[head // 4, :seen] @ q[row, head].double() * 32**-0.5
                lse[row, head] = score.logsumexp(0)
                out[row, head] = score.softmax(0) @ values[head // 4, :seen]
    return out, lse


# ------------------------------------------------------------------------------ from a cluster file on

MEASURED = """
[kernels.attention_prefill]
triton = { points = [[1024, 131072, 300]], unit = "TFLOP/s", source = "made up" }
flash_attn_3 = { points = [[1024, 131072, 600]], unit = "TFLOP/s", source = "made up" }
[kernels.attention_decode]
triton = { points = [[1, 131072, 2.8]], unit = "TB/s", source = "made up" }
flash_attn = { points = [[1, 131072, 3.0]], unit = "TB/s", source = "made up" }
"""


def test_a_cluster_files_measurements_choose_the_kernels_of_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit = importlib.import_module("mnemoc.codegen.emit")  # not the function of that name
    compiled: list[dict[str, str]] = []

    def compile_kernels(a_spec: KernelSpec, sources: dict[str, str], say: Any) -> dict[str, bytes]:
        compiled.append(sources)
        return {}

    monkeypatch.setattr(emit, "compile_kernels", compile_kernels)
    shipped = Path(load_cluster("dgx-h100").origin).read_text()
    cluster = tmp_path / "mine.toml"
    cluster.write_text(shipped + MEASURED)
    workload = Workload(100_000, 60.0, 0.1)
    pinned = {"tp": 1, "spp": 1, "kvp": 1}
    planned = pipeline.plan("llama-3-8b", str(cluster), workload, gpus=1, pinned=pinned)
    files = pipeline.dump(planned, ("kernels",))
    ours = render_kernels(emit.kernel_spec(planned.spec, planned.plan))
    assert "by FlashAttention-3" in files["kernels/attention_prefill.py"]
    assert compiled[0]["kernels/attention_prefill.py"] == files["kernels/attention_prefill.py"]
    assert files["kernels/attention_decode.py"] == ours["kernels/attention_decode.py"]
    prefill, decode = json.loads(files[providers.REPORT])
    assert prefill["speedup"] == pytest.approx(2)
    assert decode["provider"] == OURS
    assert "the plan's have 64" in decode["refused"]["flash_attn"]
    assert "kernels" in planned.cluster.describe()
    assert "kernels" not in load_cluster("dgx-h100").describe()
