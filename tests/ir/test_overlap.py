"""A layer in two halves, as text before and text after."""

import pytest
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import fuse, overlap, quantize, shard
from mnemoc.ir.text import parse, print_module
from mnemoc.ir.verify import VerifyError, verify

from .conftest import body, expect

MERGED = """
module "a layer that merges" tp=1 kvp=2 {
  func @layer(%x: f32[T, 16], %q: f32[T, 4, 4]) {
    %kv = cache : f32[KV@kvp, 2, 2, 4]
    %out, %lse = attend %q, %kv : f32[T, 4, 4]+lse(kvp); f32[T, 4]+lse(kvp)
    %out_merged, %lse_merged = merge %out, %lse {axis="kvp"} : f32[T, 4, 4]; f32[T, 4]
    %attention = merge_heads %out_merged : f32[T, 16]
    %w_o = param {sources=["o"]} : f32[16, 16]
    %o = linear %attention, %w_o : f32[T, 16]
    %y = add %x, %o : f32[T, 16]
    return %y
  }

  program main(%x: f32[T, 16], %q: f32[T, 4, 4]) {
    %x1 = @layer[0:4](%x, %q)
    return %x1
  }
}
"""


def test_overlap_sends_one_half_while_the_other_is_computed():
    module = overlap(parse(MERGED))
    expect(
        module,
        """
        %kv = cache : f32[KV@kvp, 2, 2, 4]
        %w_o = param {sources=["o"]} : f32[16, 16]
        %q_first, %q_second = halve %q : f32[T/2, 4, 4]; f32[T/2, 4, 4]
        %x_first, %x_second = halve %x : f32[T/2, 16]; f32[T/2, 16]
        %out_first, %lse_first = attend %q_first, %kv {half=0} : f32[T/2, 4, 4]+lse(kvp); f32[T/2, 4]+lse(kvp)
        %out_first_sent, %lse_first_sent = exchange %out_first, %lse_first {axis="kvp"} : f32[T/2, 4, 4]+sent(kvp); f32[T/2, 4]+sent(kvp)
        %out_second, %lse_second = attend %q_second, %kv {half=1} : f32[T/2, 4, 4]+lse(kvp); f32[T/2, 4]+lse(kvp)
        %out_second_sent, %lse_second_sent = exchange %out_second, %lse_second {axis="kvp"} : f32[T/2, 4, 4]+sent(kvp); f32[T/2, 4]+sent(kvp)
        %out_merged_first, %lse_merged_first = merge %out_first_sent, %lse_first_sent {axis="kvp"} : f32[T/2, 4, 4]; f32[T/2, 4]
        %attention_first = merge_heads %out_merged_first : f32[T/2, 16]
        %o_first = linear %attention_first, %w_o : f32[T/2, 16]
        %y_first = add %x_first, %o_first : f32[T/2, 16]
        %out_merged_second, %lse_merged_second = merge %out_second_sent, %lse_second_sent {axis="kvp"} : f32[T/2, 4, 4]; f32[T/2, 4]
        %attention_second = merge_heads %out_merged_second : f32[T/2, 16]
        %o_second = linear %attention_second, %w_o : f32[T/2, 16]
        %y_second = add %x_second, %o_second : f32[T/2, 16]
        %y = join %y_first, %y_second : f32[T, 16]
        return %y
        """,  # noqa: E501
        "layer_halves",
    )
    assert body(module) == body(parse(MERGED)), "the whole layer stays beside it"
    text = print_module(module)
    assert "%x1 = @layer[0:4](%x, %q) or @layer_halves" in text
    assert parse(text) == module


@pytest.mark.parametrize("ffn", ["repeated", "helix"])
def test_overlap_takes_any_layer_that_merges_with_all_its_kernels(ffn):
    sharded = fuse(shard(build(load_model("llama-3-8b")), tp=2, kvp=2, ffn=ffn))
    module = verify(overlap(quantize(sharded)))
    ops = [op.name for op in module.functions["layer_halves"].ops]
    suffix = "_scatter" if ffn == "helix" else ""
    assert [name for name in ops if "exchange" in name] == [f"exchange{suffix}"] * 2
    assert ops.count("linear_fp8") == 7 and ops.count("all_reduce") == 4
    assert parse(print_module(module)) == module


def test_overlap_is_nothing_where_nothing_is_merged():
    module = fuse(shard(build(load_model("llama-3-8b")), tp=4, kvp=1))
    assert overlap(module) == module


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (("merge_heads %out_merged_first", "merge_heads %out_first_sent"), "is partial"),
        (("merge %out_first_sent", "merge %out_first"), "nothing to merge"),
        (("join %y_first, %y_second", "join %y_first, %x"), "not two halves"),
        (("or @layer_halves", "or @layer_thirds"), "not alike"),
    ],
)
def test_the_verifier_knows_what_is_on_its_way_and_what_is_half(break_it, says):
    text = print_module(overlap(parse(MERGED)))
    assert break_it[0] in text
    with pytest.raises(VerifyError, match=says):
        verify(parse(text.replace(*break_it)))
