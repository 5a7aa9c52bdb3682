"""The verifier refuses what the rules forbid, and shows the place."""

import pytest
from mnemoc.ir.build import build
from mnemoc.ir.model import load_model
from mnemoc.ir.passes import fuse, shard
from mnemoc.ir.text import parse, print_module
from mnemoc.ir.verify import VerifyError, verify

TEXT = print_module(build(load_model("tiny-llama")))
SHARDED = print_module(fuse(shard(build(load_model("tiny-llama")), tp=2, kvp=2)))
HELIX = print_module(fuse(shard(build(load_model("tiny-llama")), tp=2, kvp=2, ffn="helix")))


@pytest.mark.parametrize(
    ("text", "good", "bad", "rule"),
    [
        (TEXT, "%x = embed %ids", "%x = embed %idx", "used before it is defined"),
        (TEXT, "%gate = linear", "%up = linear", "is defined twice"),
        (TEXT, "silu_mul %gate, %up", "gelu_mul %gate, %up", "there is no op 'gelu_mul'"),
        (TEXT, "add %x, %o", "add %x", "takes .a, b., not 1 operands"),
        (TEXT, "rope %q_heads, %rot", "rope %q_heads, %rot {base=2}", "has the attributes"),
        (
            TEXT,
            "%o = linear %attention, %w_o : f32[T, 256]",
            "%o = linear %attention, %w_o : f32[T, 255]",
            "the type is",
        ),
        (TEXT, "return %y", "return %z", "which it does not define"),
        (TEXT, "@head(%x1, %last)", "@tail(%x1, %last)", "which is not there"),
        (TEXT, "@head(%x1, %last)", "@head(%last, %x1)", "takes"),
        (SHARDED, "%o_reduced, %x,", "%o, %x,", "is partial: reduce or merge it first"),
        (
            SHARDED,
            "%attention = merge_heads %out_merged",
            "%attention = merge_heads %out",
            "is partial",
        ),
        (TEXT, "{sources=", "{copies=2, sources=", "copies must be of type tuple"),
        (TEXT, " : f32[256]", " : f32[256@pp]", "is placed over pp, which is no axis"),
        (
            HELIX,
            'merge_scatter %out, %lse {axis="kvp"}',
            'merge_scatter %out, %lse {axis="tp"}',
            "nothing to merge over tp",
        ),
        (HELIX, "f32[256, 256@tp_kvp]", "f32[256, 256@tp]", "inner dims are sharded differently"),
        (HELIX, 'all_reduce %o {axis="tp_kvp"}', 'all_reduce %o {axis="tp"}', "not a partial sum"),
        (SHARDED, 'all_reduce %o {axis="tp"}', 'all_reduce %o {axis="kvp"}', "not a partial sum"),
    ],
)
def test_a_broken_rule_is_refused_by_name(text, good, bad, rule):
    assert good in text
    verify(parse(text))
    with pytest.raises(VerifyError, match=rule):
        verify(parse(text.replace(good, bad)))


def test_an_error_prints_the_neighbourhood_of_the_op():
    broken = TEXT.replace("%gate = linear %ffn_input", "%gate = linear %rot")
    with pytest.raises(VerifyError) as error:
        verify(parse(broken))
    assert "> %gate = linear %rot" in str(error.value)
    assert "  %w_gate = param" in str(error.value)
