"""Sums over ranks, made by the op that reads them."""

import pytest
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import fuse, one_shot, overlap, shard
from mnemoc.ir.text import parse
from mnemoc.ir.verify import verify

from .conftest import BEFORE, body


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
