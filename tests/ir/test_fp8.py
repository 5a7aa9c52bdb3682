"""Products of 8-bit floats: the rounding, the pass that makes them, and what they compute."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.ir.build import build
from mnemoc.ir.interpret import Chunk, Interpreter
from mnemoc.ir.model import load_model
from mnemoc.ir.ops.e4m3 import nearest, scaled
from mnemoc.ir.passes import carry, fuse, quantize, shard
from mnemoc.ir.text import parse, print_module
from mnemoc.ir.verify import VerifyError, verify

from .test_passes import BEFORE, expect

E4M3 = (
    np.array(  # every value: sign, 15 exponents of 8 steps but for NaN, and those below the least
        sorted(
            {
                sign * (m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7)
                for sign in (1, -1)
                for e in range(16)
                for m in range(8)
                if (e, m) != (15, 7)
            }
        )
    )
)


@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=50))
def test_a_number_becomes_the_nearest_of_the_253_values(numbers):
    x = np.array(numbers)
    got = nearest(x)
    assert np.isin(got, E4M3).all()
    least = np.abs(E4M3[:, None] - x).min(axis=0)
    np.testing.assert_array_equal(np.abs(got - x), least)


def test_every_value_of_the_format_stays_itself_and_ties_go_to_even():
    assert (len(E4M3), E4M3.max()) == (253, 448)
    np.testing.assert_array_equal(nearest(E4M3), E4M3)
    np.testing.assert_array_equal(nearest(np.array([17.0, 19.0, 2.0**-10])), [16, 20, 0])


@given(st.integers(0, 2**31))
def test_a_scaled_row_is_off_by_half_a_step_of_its_own_size_at_most(seed):
    x = np.random.default_rng(seed).normal(size=(3, 40)) * [[1e-3], [1], [1e3]]
    values, scale = scaled(np.concatenate([x, np.zeros((1, 40))]))
    assert scale.shape == (4, 1)
    assert (np.abs(values[:3] * scale[:3] - x) <= np.abs(x) / 16 + scale[:3] * 2.0**-10).all()
    assert (values[3] == 0).all()


def test_rows_are_quantised_where_they_are_made_and_otherwise_in_a_pass():
    expect(
        quantize(fuse(shard(parse(BEFORE), tp=2, kvp=1))),
        """
        %norm = param {sources=["n"]} : f32[8]
        %h, %h_scale = rms_norm_fp8 %x, %norm {eps=1e-05} : f8e4m3[T, 8]; f32[T, 1]
        %w_gate_up = param {sources=["g", "u"]} : f8e4m3[64@tp, 8]
        %w_gate_up_scale = param {sources=["g_scale", "u_scale"]} : f32[64@tp, 1]
        %gate_up = linear_fp8 %h, %h_scale, %w_gate_up, %w_gate_up_scale {dtype="f32"} : f32[T, 64@tp]
        %active, %active_scale = swiglu_fp8 %gate_up : f8e4m3[T, 32@tp]; f32[T, 2@tp]
        %w_down = param {sources=["d"]} : f8e4m3[8, 32@tp]
        %w_down_scale = param {sources=["d_scale"]} : f32[8, 1]
        %down = linear_fp8 %active, %active_scale, %w_down, %w_down_scale {dtype="f32"} : f32[T, 8]+sum(tp)
        %down_reduced = all_reduce %down {axis="tp"} : f32[T, 8]
        %y = add %x, %down_reduced : f32[T, 8]
        return %y
        """,
    )


@pytest.mark.parametrize("preset", ["llama-3-8b", "qwen2.5-7b", "qwen3-8b"])
@pytest.mark.parametrize(
    ("tp", "kvp", "ffn"), [(1, 1, "repeated"), (4, 2, "repeated"), (2, 2, "helix")]
)
def test_every_layout_of_every_family_stays_valid_and_round_trips(preset, tp, kvp, ffn):
    spec = load_model(preset)
    if spec.num_heads % (tp * kvp):
        ffn = "repeated"
    module = verify(quantize(fuse(shard(build(spec, kv_cache="fp8"), tp=tp, kvp=kvp, ffn=ffn))))
    assert verify(parse(print_module(module))) == module
    layer, head = module.functions["layer"], module.functions["head"]
    assert [op.name for op in layer.ops].count("linear_fp8") == 4
    assert [op.name for op in layer.ops].count("quantize_fp8") == 1, "of attention's output alone"
    assert "linear" not in {op.name for op in layer.ops}
    assert {op.type.dtype for op in head.ops if op.name == "param"} == {"bf16"}


def test_scales_of_another_placement_are_refused():
    text = print_module(quantize(fuse(shard(parse(BEFORE), tp=2, kvp=1))))
    wrong = text.replace('["d_scale"]} : f32[8, 1]', '["d_scale"]} : f32[8@tp, 1]')
    assert wrong != text
    with pytest.raises(VerifyError, match="are not the scales of"):
        verify(parse(wrong))


SMALL = {"hidden": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn": 48, "vocab": 40}
TINY = dataclasses.replace(load_model("tiny-llama"), num_layers=2, **SMALL)


def weights_of(spec, seed):
    """Random weights, and the same with the layers' projections as e4m3 and their scales."""
    rng = np.random.default_rng(seed)
    plain = {
        name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in spec.tensors().items()
    }
    kept = dict(plain)
    for name in (name for name in plain if name.endswith("_proj.weight")):
        kept[name], kept[f"{name}_scale"] = scaled(plain[name])
    return plain, kept


def logits(module, weights, owner=lambda sequence, position: 0, tokens=24):
    runner = Interpreter(module, weights, owner=owner)
    ids = tuple(n * 7 % 40 for n in range(tokens))
    halves = [(0, ids[: tokens // 2]), (tokens // 2, ids[tokens // 2 :])]
    runs = [runner.run([Chunk(0, at, part)], range(len(part))) for at, part in halves]
    return np.concatenate(runs)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_fp8_is_near_what_it_stands_for_and_not_the_same(seed):
    plain, kept = weights_of(TINY, seed)
    exact = logits(build(TINY), plain)
    for module, weights in (
        (quantize(fuse(shard(build(TINY), tp=1, kvp=1))), kept),
        (build(TINY, kv_cache="fp8"), plain),
        (fuse(shard(build(TINY, kv_cache="fp8"), tp=1, kvp=1)), plain),
    ):
        off = np.abs(logits(module, weights) - exact).max() / np.abs(exact).max()
        assert 1e-4 < off < 0.2


LAYOUTS = [(1, 2, "repeated"), (2, 1, "repeated"), (2, 2, "helix")]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(LAYOUTS))
def test_a_sharded_fp8_module_is_as_near(seed, layout):
    """Groups repeat the very arithmetic; ranks that cut a row have a scale each, and so round otherwise."""
    tp, kvp, ffn = layout
    _, kept = weights_of(TINY, seed)
    source = build(TINY, kv_cache="fp8")
    whole = logits(quantize(fuse(shard(source, tp=1, kvp=1))), kept)
    planned = verify(quantize(fuse(shard(source, tp=tp, kvp=kvp, ffn=ffn))))
    got = logits(planned, kept, owner=lambda sequence, position: position // 5 % kvp)
    off = np.abs(got - whole).max() / np.abs(whole).max()
    assert off < (1e-9 if tp == 1 else 0.2)


@pytest.mark.parametrize(("tp", "kvp", "ffn"), LAYOUTS)
def test_norms_that_layers_carry_over_are_quantised_the_same(tp, kvp, ffn):
    _, kept = weights_of(TINY, 0)
    apart = quantize(fuse(shard(build(TINY), tp=tp, kvp=kvp, ffn=ffn)))
    carried = verify(carry(apart))
    assert verify(parse(print_module(carried))) == carried
    layer = carried.functions["layer"]
    assert layer.ops[-1].name == "add_rms_norm_fp8"
    assert [value.type.dtype for value in layer.params[:3]] == ["f32", "f8e4m3", "f32"]

    def computed(module):
        return logits(module, kept, owner=lambda sequence, position: position // 5 % kvp)

    np.testing.assert_array_equal(computed(carried), computed(apart))
