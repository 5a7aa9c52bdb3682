"""Passes as text before and text after."""

import dataclasses
import textwrap

import pytest
from mnemoc.errors import BadInput
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import carry, fuse, one_shot, overlap, quantize, shard, split_stages
from mnemoc.ir.text import parse, print_call, print_module
from mnemoc.ir.verify import VerifyError, verify

BEFORE = """
module "mlp" tp=1 kvp=1 {
  func @layer(%x: f32[T, 8]) {
    %norm = param {sources=["n"]} : f32[8]
    %h = rms_norm %x, %norm {eps=1e-05} : f32[T, 8]
    %w_gate = param {sources=["g"]} : f32[32, 8]
    %gate = linear %h, %w_gate : f32[T, 32]
    %w_up = param {sources=["u"]} : f32[32, 8]
    %up = linear %h, %w_up : f32[T, 32]
    %active = silu_mul %gate, %up : f32[T, 32]
    %w_down = param {sources=["d"]} : f32[8, 32]
    %down = linear %active, %w_down : f32[T, 8]
    %y = add %x, %down : f32[T, 8]
    return %y
  }

  program main(%x: f32[T, 8]) {
    %x1 = @layer[0:4](%x)
    return %x1
  }
}
"""


def body(module, name="layer"):
    text = print_module(module)
    start = text.index(f"func @{name}")
    return textwrap.dedent("  " + text[start : text.index("\n  }", start)]).splitlines()[1:]


def expect(module, lines, name="layer"):
    wanted = [line.strip() for line in textwrap.dedent(lines).strip().splitlines()]
    assert [line.strip() for line in body(verify(module), name)] == wanted


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


def test_carry_ends_each_layer_with_the_norm_of_the_next():
    module = verify(carry(fuse(shard(parse(BEFORE), tp=2, kvp=1))))
    between = """
        %w_gate_up = param {sources=["g", "u"]} : f32[64@tp, 8]
        %gate_up = linear %h, %w_gate_up : f32[T, 64@tp]
        %active = swiglu %gate_up : f32[T, 32@tp]
        %w_down = param {sources=["d"]} : f32[8, 32@tp]
        %down = linear %active, %w_down : f32[T, 8]+sum(tp)
        %down_reduced = all_reduce %down {axis="tp"} : f32[T, 8]
    """
    entry = """
        %norm = param {sources=["n"]} : f32[8]
        %h = rms_norm %x, %norm {eps=1e-05} : f32[T, 8]
        return %h
    """
    inner = """
        %norm = param {ahead=1, sources=["n"]} : f32[8]
        %next_h, %y = add_rms_norm %down_reduced, %x, %norm {eps=1e-05} : f32[T, 8]; f32[T, 8]
        return %y, %next_h
    """
    expect(module, entry, "layer_entry(%x: f32[T, 8])")
    expect(module, between.rstrip() + inner, "layer(%x: f32[T, 8], %h: f32[T, 8])")
    last = "%y = add %x, %down_reduced : f32[T, 8]\nreturn %y"
    expect(module, textwrap.dedent(between) + last, "layer_last(%x: f32[T, 8], %h: f32[T, 8])")


def test_carry_leaves_what_enters_and_leaves_each_run_of_layers():
    module = fuse(shard(build(load_model("llama-3-8b")), tp=2, kvp=1))
    staged = verify(carry(split_stages(module, [1, 29, 2], ["a", "b", "c"])))
    calls = [[print_call(call) for call in program.calls] for program in staged.programs]
    assert calls[0] == [
        "%x0 = @embed(%ids)",
        "%rot = @rotation(%pos)",
        "%x0_normed = @layer_entry[0:1](%x0)",
        "%x1 = @layer_last[0:1](%x0, %x0_normed, %rot)",
    ]
    assert calls[1][1:] == [
        "%x1_in_normed = @layer_entry[1:2](%x1_in)",
        "%x1_before, %x1_before_normed = @layer[1:29](%x1_in, %x1_in_normed, %rot)",
        "%x1 = @layer_last[29:30](%x1_before, %x1_before_normed, %rot)",
    ]
    assert [value.name for value in staged.programs[2].params] == ["pos", "x1_in", "last"]
    assert carry(module).programs[0].calls[-1] == module.program.calls[-1], "the head's own norm"


def test_carry_norms_halves_after_they_are_joined():
    module = verify(carry(overlap(fuse(shard(build(load_model("llama-3-8b")), tp=2, kvp=2)))))
    inner, last = (call for call in module.program.calls if call.halved)
    assert (inner.halved, last.halved) == ("layer_halves", "layer_halves_last")
    ending = [op.name for op in module.functions["layer_halves"].ops][-3:]
    assert ending == ["join", "param", "rms_norm"]
    assert "layer_halves_entry" not in module.functions


def test_carry_leaves_layers_that_begin_otherwise():
    module = fuse(
        shard(
            parse(
                BEFORE.replace("rms_norm %x", "rms_norm %z").replace(
                    "%norm = ", '%z = cast %x {dtype="f32"} : f32[T, 8]\n    %norm = '
                )
            ),
            tp=1,
            kvp=1,
        )
    )
    assert carry(verify(module)) == module


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


def test_sums_over_tp_are_made_by_what_reads_them_and_take_two_buffers_in_turn():
    module = one_shot(fuse(shard(build(load_model("qwen3-8b")), tp=4, kvp=1)))
    lines = "\n".join(body(verify(module)))
    for wanted in (
        '%ffn_input, %x_attention = all_reduce_add_rms_norm %o, %x, %ffn_norm {axis="tp", eps=1e-06, turn=0}',
        '%y = all_reduce_add %x_attention, %down {axis="tp", turn=1} : bf16[T, 4096]',
    ):
        assert wanted in lines
    assert "all_reduce %" not in lines
    assert "all_reduce %x" in "\n".join(body(module, "embed")), "nobody adds to the embedding"


def test_both_halves_of_a_layer_take_the_buffers_in_turn():
    module = verify(one_shot(overlap(fuse(shard(build(load_model("qwen3-8b")), tp=4, kvp=2)))))
    ops = [op for op in module.functions["layer_halves"].ops if "turn" in op.attrs]
    assert [op.attrs["turn"] for op in ops] == [0, 1, 0, 1]


def test_a_sum_without_a_second_stays_an_all_reduce_and_so_do_those_over_the_groups():
    alone = fuse(shard(parse(BEFORE), tp=2, kvp=1))
    assert one_shot(alone) == alone
    helix = fuse(shard(build(load_model("llama-3-8b")), tp=4, kvp=2, ffn="helix"))
    assert one_shot(helix) == helix


PRODUCT = "%{name} = linear %x, %w : f32[T, 8]+sum(tp)"
SUM = '%{name}_sum = all_reduce %{name} {{axis="tp"}} : f32[T, 8]'
TWO_SUMS = """
module "two" tp=2 kvp=1 {{
  func @layer(%z: f32[T, 8], %x: f32[T, 8@tp]) {{
    %w = param {{sources=["w"]}} : f32[8, 8@tp]
    %y = add %z, %z : f32[T, 8]
    {lines}
    return {returned}
  }}

  program main(%z: f32[T, 8], %x: f32[T, 8@tp]) {{
    %r = @layer(%z, %x)
    return %r
  }}
}}
"""


@pytest.mark.parametrize(
    ("lines", "returned", "joined"),
    [
        (("a", "a_sum", "%c = add %y, %a_sum", "b", "b_sum", "%d = add %c, %b_sum"), "%d", True),
        (("a", "b", "a_sum", "%c = add %y, %a_sum", "b_sum", "%d = add %c, %b_sum"), "%d", False),
        (("a", "a_sum", "%c = add %a_sum, %y", "b", "b_sum", "%d = add %c, %b_sum"), "%d", False),
        (("a", "a_sum", "%c = add %z, %a_sum", "b", "b_sum", "%d = add %c, %b_sum"), "%d", False),
        (
            ("a", "a_sum", "%c = add %y, %a_sum", "b", "b_sum", "%d = add %c, %b_sum"),
            "%b_sum",
            False,
        ),
    ],
    ids=["in turn", "written too early", "the other operand", "not to write over", "returned"],
)
def test_a_sum_is_joined_only_with_an_add_that_may_take_it(lines, returned, joined):
    forms = {"a": PRODUCT, "b": PRODUCT, "a_sum": SUM, "b_sum": SUM}
    text = [
        forms[line].format(name=line[0]) if line in forms else f"{line} : f32[T, 8]"
        for line in lines
    ]
    module = verify(parse(TWO_SUMS.format(lines="\n    ".join(text), returned=returned)))
    assert (verify(one_shot(module)) != module) == joined


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
