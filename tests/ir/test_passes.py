"""Passes as text before and text after."""

import dataclasses

import pytest
from mnemoc.errors import BadInput
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import fuse, shard, split_stages
from mnemoc.ir.text import parse, print_module
from mnemoc.ir.verify import verify

from .conftest import BEFORE, body, expect


def test_shard_cuts_columns_then_rows_and_reduces_once():
    expect(
        shard(parse(BEFORE), tp=2, kvp=1),
        """
        %norm = param {sources=["n"]} : f32[8]
        %h = rms_norm %x, %norm {eps=1e-05} : f32[T, 8]
        %w_gate = param {sources=["g"]} : f32[32@tp, 8]
        %gate = linear %h, %w_gate : f32[T, 32@tp]
        %w_up = param {sources=["u"]} : f32[32@tp, 8]
        %up = linear %h, %w_up : f32[T, 32@tp]
        %active = silu_mul %gate, %up : f32[T, 32@tp]
        %w_down = param {sources=["d"]} : f32[8, 32@tp]
        %down = linear %active, %w_down : f32[T, 8]+sum(tp)
        %down_reduced = all_reduce %down {axis="tp"} : f32[T, 8]
        %y = add %x, %down_reduced : f32[T, 8]
        return %y
        """,
    )


def test_fuse_joins_gate_and_up():
    expect(
        fuse(shard(parse(BEFORE), tp=2, kvp=1)),
        """
        %norm = param {sources=["n"]} : f32[8]
        %h = rms_norm %x, %norm {eps=1e-05} : f32[T, 8]
        %w_gate_up = param {sources=["g", "u"]} : f32[64@tp, 8]
        %gate_up = linear %h, %w_gate_up : f32[T, 64@tp]
        %active = swiglu %gate_up : f32[T, 32@tp]
        %w_down = param {sources=["d"]} : f32[8, 32@tp]
        %down = linear %active, %w_down : f32[T, 8]+sum(tp)
        %down_reduced = all_reduce %down {axis="tp"} : f32[T, 8]
        %y = add %x, %down_reduced : f32[T, 8]
        return %y
        """,
    )


def test_a_whole_layer_sharded_and_fused():
    module = fuse(shard(build(load_model("qwen3-8b")), tp=4, kvp=2))
    lines = "\n".join(body(module))
    for wanted in (
        "%q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm",
        "%out, %lse = attend %q_rotated, %kv_new : bf16[T, 32@tp, 128]+lse(kvp)",
        '%out_merged, %lse_merged = merge %out, %lse {axis="kvp"}',
        "%ffn_input, %x_attention = add_rms_norm %o_reduced, %x, %ffn_norm",
    ):
        assert wanted in lines
    assert lines.count("all_reduce") == 2


def test_helix_cuts_what_follows_the_merge_over_tp_and_kvp():
    lines = body(fuse(shard(build(load_model("llama-3-8b")), tp=4, kvp=2, ffn="helix")))
    after = next(i for i, line in enumerate(lines) if "merge_scatter" in line)
    wanted = """
        %out_merged, %lse_merged = merge_scatter %out, %lse {axis="kvp"} : bf16[T, 32@tp_kvp, 128]; f32[T, 32@tp_kvp]
        %attention = merge_heads %out_merged : bf16[T, 4096@tp_kvp]
        %w_o = param {sources=["model.layers.{layer}.self_attn.o_proj.weight"]} : bf16[4096, 4096@tp_kvp]
        %o = linear %attention, %w_o : bf16[T, 4096]+sum(tp_kvp)
        %o_reduced = all_reduce %o {axis="tp_kvp"} : bf16[T, 4096]
        %ffn_norm = param {sources=["model.layers.{layer}.post_attention_layernorm.weight"]} : bf16[4096]
        %ffn_input, %x_attention = add_rms_norm %o_reduced, %x, %ffn_norm {eps=1e-05} : bf16[T, 4096]; bf16[T, 4096]
        %w_gate_up = param {sources=["model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"]} : bf16[28672@tp_kvp, 4096]
        %gate_up = linear %ffn_input, %w_gate_up : bf16[T, 28672@tp_kvp]
        %active = swiglu %gate_up : bf16[T, 14336@tp_kvp]
        %w_down = param {sources=["model.layers.{layer}.mlp.down_proj.weight"]} : bf16[4096, 14336@tp_kvp]
        %down = linear %active, %w_down : bf16[T, 4096]+sum(tp_kvp)
        %down_reduced = all_reduce %down {axis="tp_kvp"} : bf16[T, 4096]
        %y = add %x_attention, %down_reduced : bf16[T, 4096]
        return %y
    """  # noqa: E501
    assert [line.strip() for line in lines[after:]] == [
        line.strip() for line in wanted.strip().splitlines()
    ]


def test_helix_is_nothing_without_groups():
    spec = build(load_model("llama-3-8b"))
    assert shard(spec, tp=4, kvp=1, ffn="helix") == shard(spec, tp=4, kvp=1)


@pytest.mark.parametrize(
    ("tp", "kvp", "count"), [(4, 3, "32 heads"), (2, 32, "32 heads"), (1, 8, "12 FFN columns")]
)
def test_degrees_that_helix_does_not_divide_by_are_refused(tp, kvp, count):
    spec = dataclasses.replace(load_model("llama-3-8b"), ffn=12)
    with pytest.raises(BadInput, match=f"tp={tp}, kvp={kvp} do not divide the {count}"):
        shard(build(spec), tp=tp, kvp=kvp, ffn="helix")


def test_qkv_biases_are_joined_like_their_weights():
    lines = "\n".join(body(fuse(shard(build(load_model("qwen2.5-7b")), tp=2, kvp=1))))
    assert "%qkv = linear %normed, %w_qkv, %b_qkv : bf16[T, 4608@tp]" in lines


REPEATED = """
module "two KV heads on four ranks" tp=1 kvp=1 {
  func @layer(%x: f32[T, 16], %rot: f32[T, 2, 2]) {
    %w_q = param {sources=["q"]} : f32[16, 16]
    %q = linear %x, %w_q : f32[T, 16]
    %q_heads = split_heads %q {heads=4} : f32[T, 4, 4]
    %q_rotated = rope %q_heads, %rot : f32[T, 4, 4]
    %w_k = param {sources=["k"]} : f32[8, 16]
    %b_k = param {sources=["kb"]} : f32[8]
    %k = linear %x, %w_k, %b_k : f32[T, 8]
    %k_heads = split_heads %k {heads=2} : f32[T, 2, 4]
    %k_rotated = rope %k_heads, %rot : f32[T, 2, 4]
    %kv = cache : f32[KV, 2, 2, 4]
    %kv_new = append %kv, %k_rotated, %k_rotated : f32[KV, 2, 2, 4]
    %out, %lse = attend %q_rotated, %kv_new : f32[T, 4, 4]; f32[T, 4]
    %flat = merge_heads %out : f32[T, 16]
    return %flat
  }

  program main(%x: f32[T, 16], %rot: f32[T, 2, 2]) {
    %y = @layer(%x, %rot)
    return %y
  }
}
"""


def test_shard_repeats_kv_heads_where_there_are_more_ranks():
    expect(
        shard(parse(REPEATED), tp=4, kvp=1),
        """
        %w_q = param {sources=["q"]} : f32[16@tp, 16]
        %q = linear %x, %w_q : f32[T, 16@tp]
        %q_heads = split_heads %q {heads=4} : f32[T, 4@tp, 4]
        %q_rotated = rope %q_heads, %rot : f32[T, 4@tp, 4]
        %w_k = param {copies=[2], sources=["k"]} : f32[16@tp, 16]
        %b_k = param {copies=[2], sources=["kb"]} : f32[16@tp]
        %k = linear %x, %w_k, %b_k : f32[T, 16@tp]
        %k_heads = split_heads %k {heads=4} : f32[T, 4@tp, 4]
        %k_rotated = rope %k_heads, %rot : f32[T, 4@tp, 4]
        %kv = cache : f32[KV, 2, 4@tp, 4]
        %kv_new = append %kv, %k_rotated, %k_rotated : f32[KV, 2, 4@tp, 4]
        %out, %lse = attend %q_rotated, %kv_new : f32[T, 4@tp, 4]; f32[T, 4@tp]
        %flat = merge_heads %out : f32[T, 16@tp]
        %flat_gathered = all_gather %flat {axis="tp", dim=1} : f32[T, 16]
        return %flat_gathered
        """,
    )


def test_joined_weights_keep_what_each_source_repeats():
    spec = dataclasses.replace(load_model("qwen2.5-7b"), num_heads=32, num_layers=1)
    assert spec.num_kv_heads == 4
    module = verify(fuse(shard(build(spec), tp=8, kvp=1)))
    joined = [line for line in body(module) if "copies" in line]
    assert [line.split()[0] for line in joined] == ["%w_qkv", "%b_qkv"]
    assert all("{copies=[1, 2, 2], sources=" in line for line in joined)
    assert parse(print_module(module)) == module


def test_without_tp_and_kvp_nothing_is_communicated():
    text = print_module(shard(build(load_model("llama-3-8b")), tp=1, kvp=1))
    assert not any(word in text for word in ("all_reduce", "all_gather", "merge %", "@tp", "@kvp"))


def test_tp_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(BadInput, match="tp=3 does not divide the 32 heads"):
        shard(build(load_model("llama-3-8b")), tp=3, kvp=1)


def test_a_vocabulary_that_tp_does_not_divide_stays_whole():
    spec = dataclasses.replace(load_model("tiny-llama"), vocab=511)
    module = verify(shard(build(spec), tp=2, kvp=1))
    assert "%logits = linear %normed, %w_head : f32[R, 511]" in "\n".join(body(module, "head"))


def test_stages_slice_the_program_and_repeat_what_every_layer_reads():
    module = verify(split_stages(build(load_model("tiny-llama")), [1, 2, 1], ["a", "b", "c"]))
    calls = {p.name: [(c.function, c.layers) for c in p.calls] for p in module.programs}
    assert calls == {
        "a": [("embed", None), ("rotation", None), ("layer", (0, 1))],
        "b": [("rotation", None), ("layer", (1, 3))],
        "c": [("rotation", None), ("layer", (3, 4)), ("head", None)],
    }
    assert [[v.name for v in p.params] for p in module.programs] == [
        ["ids", "pos"],
        ["pos", "x1_in"],
        ["pos", "x1_in", "last"],
    ]
