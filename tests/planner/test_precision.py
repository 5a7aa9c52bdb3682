"""fp8 weights and KV cache: priced by hand, never worse on Hopper, and refused where there is none."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.artifact import Plan, Precision, Workload
from mnemoc.errors import BadInput, UsageError
from mnemoc.ir.model import ModelSpec, load_model
from mnemoc.layout import Layout
from mnemoc.planner import (
    Cluster,
    Configuration,
    Forecast,
    WhatIf,
    forecast,
    load_cluster,
    make_plan,
)
from mnemoc.planner.check import violations
from mnemoc.planner.chunks import Sizes
from mnemoc.planner.cluster import Quantity
from mnemoc.planner.curves import constant
from mnemoc.planner.formulas import compile_parts
from mnemoc.planner.price import Pricer
from mnemoc.planner.tell import tell

from .conftest import small_cluster, small_model

WEIGHTS, CACHE, BOTH = Precision("fp8"), Precision("auto", "fp8"), Precision("fp8", "fp8")
MILLION = Workload(10**6, 1e3, 1.0)
SHARED = 4096 * 4096 + 3 * 14336 * 4096  # elements of o, gate, up and down of llama-3-8b
QKV = (4096 + 2 * 1024) * 4096


def h100() -> Cluster:
    return load_cluster("dgx-h100")


def layer(precision: Precision, tp: int = 1, **sizes: float) -> Mapping[str, float]:
    """Seconds of a layer of llama-3-8b by part."""
    pricer = Pricer(load_model("llama-3-8b"), h100(), "bfloat16", MILLION, precision)
    parts = compile_parts(pricer.formulas(Layout(tp, 1, 1)))
    given = {name: np.array(sizes.get(name, 0.0)) for name in ("T", "R", "QK", "KV", "KD", "X")}
    return {part: float(seconds) for part, seconds in parts(Sizes(**given))["layer"].items()}


def test_products_of_many_rows_run_at_the_fp8_peak() -> None:
    rows = 8192
    seconds = layer(WEIGHTS, T=rows, QK=1)["linear"]
    assert seconds == pytest.approx(2 * rows * (QKV + SHARED) / (1979e12 * 0.569))


def test_a_decode_streams_one_byte_per_weight_and_the_scales_and_rows_beside() -> None:
    seconds = layer(WEIGHTS, T=1)["linear"]
    channels = 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096
    rows = 3 * 4096 + 14336 + 4 * 4 + 2 * channels  # read in fp8 with four scales, written in bf16
    moved = QKV + SHARED + 4 * channels + rows
    assert seconds == pytest.approx(moved / (3.35e12 * 0.687))


def test_norms_and_swiglu_write_half_as_much_and_attention_is_read_again() -> None:
    rows = 8192
    saved = layer(Precision(), T=rows, QK=1)["other"] - layer(WEIGHTS, T=rows, QK=1)["other"]
    stored = rows * (2 * (4096 - 4) + 14336 - 4)  # two norms and SwiGLU: a byte less, a scale more
    passed = rows * (2 * 4096 + 4096 + 4)
    assert saved == pytest.approx((stored - passed) / (3.35e12 * 0.687))


def test_an_eight_to_one_decode_reads_half_the_bytes() -> None:
    """8 query heads on one KV head a rank, as 70B with tp=8 has: bytes and half size by the curve."""
    pricer = {
        kept: Pricer(load_model("llama-3-70b"), h100(), "bfloat16", MILLION, kept)
        for kept in (Precision(), CACHE)
    }
    tokens, curve = 10**6, h100().curves["attention_decode"]
    for kept, item in ((Precision(), 2), (CACHE, 1)):
        parts = compile_parts(pricer[kept].formulas(Layout(8, 1, 1)))
        sizes = Sizes(*(np.array(n) for n in (1.0, 0.0, 0.0, 0.0, float(tokens), 0.0)))
        read = tokens * 2 * 128 * item
        row = 2 * 8 * 128 * 2  # queries and outputs, in bf16 either way
        expected = (read + row + curve.half) / (3.35e12 * curve.full)
        assert float(parts(sizes)["layer"]["attention"]) == pytest.approx(expected)


def said(spec: ModelSpec, layout: Layout, precision: Precision, **more: int) -> Forecast:
    asked = Configuration(layout, more.pop("prompt", 10**5), precision=precision, **more)
    return forecast(spec, h100(), asked)


def test_memory_is_counted_from_the_element_types() -> None:
    spec = load_model("llama-3-8b")
    plain, fp8 = (said(spec, Layout(1, 1, 1), kept).memory for kept in (Precision(), BOTH))
    channels = 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096
    assert fp8.weights_bytes == plain.weights_bytes - 32 * (QKV + SHARED - 4 * channels)
    assert 2 * fp8.kv_bytes == plain.kv_bytes
    assert fp8.activation_bytes < plain.activation_bytes


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["llama-3-8b", "qwen3-8b", "qwen3-32b", "llama-3-70b"]),
    layout=st.builds(
        Layout, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 4]), st.sampled_from([1, 2])
    ),
    prompt=st.integers(10**4, 10**6),
    concurrency=st.integers(1, 32),
    chunk=st.integers(256, 10**5),
)
def test_fp8_is_never_slower_or_larger_than_bf16_on_hopper(
    name: str, layout: Layout, prompt: int, concurrency: int, chunk: int
) -> None:
    spec = load_model(name)
    precisions = (Precision(), WEIGHTS, CACHE, BOTH)
    more = {"prompt": prompt, "concurrency": concurrency, "chunk": chunk}
    plain, weights, cache, both = (said(spec, layout, kept, **more) for kept in precisions)
    for better, worse in ((weights, plain), (cache, plain), (both, weights), (both, cache)):
        assert better.ttft.seconds <= worse.ttft.seconds * (1 + 1e-9)
        assert better.tbt.seconds <= worse.tbt.seconds * (1 + 1e-9)
        assert better.memory.used_bytes <= worse.memory.used_bytes


def test_where_launches_take_longer_than_kernels_the_pass_after_attention_shows() -> None:
    """An op more per layer: a decode of a small model waits for the host, in fp8 once more."""
    spec = load_model("tiny-llama")
    one = Layout(1, 1, 1)
    plain, fp8 = (said(spec, one, kept, prompt=1000).tbt for kept in (Precision(), WEIGHTS))
    longer = (fp8.seconds - plain.seconds) / spec.num_layers
    assert 0 < longer <= h100()["overhead.launch"] * (1 + 1e-9)


def test_a_plan_in_fp8_needs_no_more_devices_and_says_what_it_rests_on() -> None:
    spec, workload = load_model("llama-3-70b"), Workload(10**6, 60, 0.03)
    plain, fp8 = (
        make_plan(spec, h100(), workload, precision=kept).plan for kept in (Precision(), BOTH)
    )
    assert fp8.gpus <= plain.gpus
    assert (fp8.dtype, fp8.precision) == ("bfloat16", BOTH)
    notes = " ".join(fp8.notes)
    for words in ("FBGEMM pull request 2546", "a byte per element"):
        assert words in notes
        assert words not in " ".join(plain.notes)


def test_what_if_answers_in_fp8_as_its_plan_does() -> None:
    workload = Workload(10**6, 60, 0.03, objective="ttft")
    question = WhatIf(load_model("llama-3-8b"), h100(), workload, gpus=16, precision=CACHE)
    answer = question.solve()
    plan = make_plan(load_model("llama-3-8b"), h100(), workload, gpus=16, precision=CACHE).plan
    assert answer is not None
    assert answer.ttft_s == pytest.approx(plan.predicted.ttft_s, rel=1e-6)


def able_cluster(**changed: float) -> Cluster:
    """The small cluster as if of GPUs that multiply fp8."""
    plain = small_cluster(memory__communicator=1e6, **changed)
    numbers = {**plain.numbers, "peak.float8": Quantity(2e11, "", "test")}
    curves = {**plain.curves, "matmul_fp8": constant(0.5, "rows", "test")}
    return dataclasses.replace(plain, target="cuda:sm_90", numbers=numbers, curves=curves)


@settings(max_examples=20, deadline=None)
@given(
    context=st.integers(1, 100_000),
    concurrency=st.integers(1, 4),
    tp=st.sampled_from([1, 2, 4]),
    kvp=st.sampled_from([1, 2]),
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    bias=st.booleans(),
    helix=st.booleans(),
    precision=st.sampled_from([WEIGHTS, CACHE, BOTH]),
)
def test_every_fp8_plan_passes_the_independent_check_and_no_other_precision_does(
    context: int,
    concurrency: int,
    tp: int,
    kvp: int,
    kv_heads: int,
    tied: bool,
    bias: bool,
    helix: bool,
    precision: Precision,
) -> None:
    spec = small_model(num_heads=16, num_kv_heads=kv_heads, tied_embeddings=tied, qkv_bias=bias)
    machine, workload = able_cluster(), Workload(context, 1e4, 10.0, 100, concurrency)
    pins: dict[str, int | str] = {"tp": tp, "kvp": kvp}
    pins["ffn"] = "helix" if helix and kvp > 1 else "repeated"
    made = make_plan(spec, machine, workload, pinned=pins, precision=precision)
    assert violations(made.plan, spec, machine, workload, made.formulas) == ()
    for other in {Precision(), WEIGHTS, CACHE, BOTH} - {precision}:
        wrong: Plan = dataclasses.replace(made.plan, precision=other)
        assert violations(wrong, spec, machine, workload, made.formulas)


@pytest.mark.parametrize(
    ("cluster", "precision", "error", "complaint"),
    [
        ("dgx-a100", WEIGHTS, BadInput, "no fp8 on NVIDIA A100.*dgx-b200, dgx-h100, dgx-h200"),
        ("dgx-a100", CACHE, BadInput, r"gives no peak\.float8"),
        ("local", CACHE, BadInput, "not for CPUs"),
        ("dgx-h100", Precision("int4"), UsageError, "unknown precision of weights"),
        ("dgx-h100", Precision("auto", "fp4"), UsageError, "unknown precision of kv_cache"),
    ],
)
def test_what_a_cluster_cannot_compute_is_refused_in_one_sentence(
    cluster: str, precision: Precision, error: type[Exception], complaint: str
) -> None:
    machine, spec = load_cluster(cluster), load_model("llama-3-8b")
    with pytest.raises(error, match=complaint):
        forecast(spec, machine, Configuration(Layout(1, 1, 1), 100, precision=precision))
    with pytest.raises(error, match=complaint):
        WhatIf(spec, machine, Workload(100, 60, 1), precision=precision)


def test_a_peak_without_a_curve_is_not_guessed() -> None:
    able = able_cluster()
    curves = {name: curve for name, curve in able.curves.items() if name != "matmul_fp8"}
    with pytest.raises(BadInput, match=r"efficiency\.matmul_fp8 of this cluster is not known"):
        make_plan(
            small_model(),
            dataclasses.replace(able, curves=curves),
            Workload(100, 60, 1),
            precision=WEIGHTS,
        )


def test_what_is_assumed_for_fp8_is_said_and_widens_the_band() -> None:
    spec, layout = load_model("llama-3-8b"), Layout(8, 1, 1)
    plain, fp8 = said(spec, layout, Precision()), said(spec, layout, BOTH)

    def use(of: Forecast, figure: str, part: str) -> tuple[str, float, str]:
        (found,) = (u for u in of.uses if (u.figure, u.part) == (figure, part))
        return found.key, found.band, found.words

    assert use(fp8, "ttft", "linear")[0] == "efficiency.matmul_fp8"
    for figure, part, words in (
        ("tbt", "linear", "of 16-bit weights, assumed for fp8"),
        ("tbt", "attention", "of a 16-bit cache, assumed for fp8"),
        ("ttft", "attention", "of a 16-bit cache, assumed for fp8"),
    ):
        assert words in use(fp8, figure, part)[2]
        assert "assumed" not in use(plain, figure, part)[2]
        assert use(fp8, figure, part)[1] >= 0.25
    text = "\n".join(
        tell("m", "c", Configuration(layout, 10**5, precision=BOTH), fp8),
    )
    assert "bfloat16 with fp8 weights and KV cache" in text
