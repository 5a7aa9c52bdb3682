"""Exact counts, held against the paper's arithmetic."""

import sympy
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.ops import function_works
from mnemoc.ir.passes import fuse, shard
from mnemoc.ir.sizes import KD, KV, QK, SYMBOLS, R, T, X


def works(preset, tp=1, kvp=1, function="layer"):
    module = fuse(shard(build(load_model(preset)), tp=tp, kvp=kvp))
    return function_works(module.functions[function], module)


def total(works, field, **resources):
    chosen = [w for w in works if w.resource in resources.get("of", (w.resource,))]
    return sympy.expand(sum(getattr(w, field) for w in chosen))


def test_linear_flops_are_twice_the_weights_per_token():
    spec = load_model("llama-3-8b")
    weights = (
        spec.hidden * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        + spec.hidden * spec.num_heads * spec.head_dim
        + 3 * spec.hidden * spec.ffn
    )
    assert total(works("llama-3-8b"), "flops", of=("matmul",)) == 2 * weights * T


def test_a_million_token_prefill_of_70b_takes_2_8_exaflop_without_the_causal_half():
    spec = load_model("llama-3-70b")
    n = 10**6
    layer = total(works("llama-3-70b"), "flops").subs({QK: n * n, KD: 0, T: n})
    assert 2.6e18 < layer * spec.num_layers < 2.9e18  # paper, F2


def test_kv_of_a_token_is_128_kib_for_8b_and_320_kib_for_70b():
    for preset, kib in (("llama-3-8b", 128), ("llama-3-70b", 320)):
        read = total(works(preset), "bytes", of=("attention_decode",)).coeff(KD)
        assert read * load_model(preset).num_layers == kib * 1024


def test_arithmetic_intensity_of_a_chunk_is_free_of_the_context():
    (prefill,) = (w for w in works("llama-3-70b") if w.resource == "attention_prefill")
    chunk, spec = 128, load_model("llama-3-70b")
    for n in (10**5, 10**6, 10**7):
        at = {QK: chunk * n, KV: n, T: chunk, KD: 0}
        intensity = prefill.flops.subs(at) / prefill.bytes.subs(at)
        wanted = chunk * spec.num_heads / spec.num_kv_heads
        assert abs(intensity / wanted - 1) < 0.02  # paper's equation 1


def test_tp_divides_the_work_and_adds_two_reductions_a_layer():
    whole, cut = works("llama-3-8b"), works("llama-3-8b", tp=8)
    assert total(cut, "flops") == total(whole, "flops") / 8
    assert [w.resource for w in cut if w.axis] == ["all_reduce", "all_reduce"]
    assert total(cut, "bytes", of=("all_reduce",)) == 2 * T * 4096 * 2


def test_kvp_traffic_does_not_depend_on_the_context():
    (exchange,) = (w for w in works("llama-3-8b", tp=8, kvp=4) if w.axis == "kvp")
    assert exchange.bytes == X * 4 * (128 * 2 + 16)
    assert exchange.bytes.free_symbols == {X}


def test_only_the_six_symbols_occur():
    for function in ("embed", "rotation", "layer", "head"):
        for work in works("qwen3-8b", tp=2, kvp=2, function=function):
            for size in (work.flops, work.bytes):
                assert sympy.sympify(size).free_symbols <= set(SYMBOLS)
    assert total(works("qwen3-8b", function="head"), "flops") == 2 * R * 4096 * 151936
