"""A layer ends with the norm that the next begins with."""

import textwrap

from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import carry, fuse, overlap, shard, split_stages
from mnemoc.ir.text import parse, print_call
from mnemoc.ir.verify import verify

from .conftest import BEFORE, expect


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
