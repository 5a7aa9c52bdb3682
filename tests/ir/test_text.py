"""The text form round-trips, and says where it is malformed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.errors import BadInput
from mnemoc.ir.build import build
from mnemoc.ir.graph import view
from mnemoc.ir.model import load_model, presets
from mnemoc.ir.passes import carry, fuse, lower, shard, split_stages
from mnemoc.ir.sizes import KV, SYMBOLS, T, normal
from mnemoc.ir.text import parse, print_module
from mnemoc.ir.types import AXES, PRODUCT, Partial, TensorType
from mnemoc.ir.verify import verify

TYPES = st.builds(
    lambda dtype, dims, partial: TensorType(
        dtype, tuple(size for size, _ in dims), tuple(axis for _, axis in dims), partial
    ),
    st.sampled_from(["f32", "bf16", "f16", "i64"]),
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(1, 2**20),
                st.sampled_from(SYMBOLS),
                st.builds(
                    lambda a, n: normal(a * n + T), st.sampled_from(SYMBOLS), st.integers(1, 9)
                ),
            ),
            st.sampled_from([None, *AXES, PRODUCT]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.one_of(
        st.none(),
        st.builds(Partial, st.sampled_from(["sum", "lse"]), st.sampled_from([*AXES, PRODUCT])),
    ),
)


@pytest.mark.parametrize("ffn", ["repeated", "helix"])
@pytest.mark.parametrize("preset", presets())
def test_every_preset_round_trips_before_and_after_the_passes(preset, ffn):
    module = verify(build(load_model(preset)))
    layers = load_model(preset).num_layers
    staged = split_stages(fuse(shard(module, tp=2, kvp=2, ffn=ffn)), [layers - 1, 1], ["a", "b"])
    for stage in (module, verify(lower(verify(carry(staged)), "cpu"))):
        assert parse(print_module(stage)) == stage


@given(TYPES)
def test_every_type_round_trips(tensor):
    module = build(load_model("tiny-llama"))
    embed = module.functions["embed"]
    param = dataclasses.replace(
        embed.ops[0], results=(dataclasses.replace(embed.ops[0].results[0], type=tensor),)
    )
    edited = dataclasses.replace(embed, ops=(param, *embed.ops[1:]))
    module = dataclasses.replace(module, functions={**module.functions, "embed": edited})
    assert parse(print_module(module)) == module


@pytest.mark.parametrize(
    ("line", "broken", "message"),
    [
        ("%x = embed %ids, %embedding : f32[T, 256]", "%x = embed %ids", "expected %value = op"),
        ("f32[T, 256]", "f32[T, Q]", "is no size"),
        ("f32[T, 256]", "f32[T, __import__('os')]", "is no size"),
        ("eps=1e-05", "eps=", "attributes are malformed"),
        ("program main", "programme main", "expected program NAME"),
    ],
)
def test_malformed_text_names_its_line(line, broken, message):
    text = print_module(build(load_model("tiny-llama")))
    assert line in text
    with pytest.raises(BadInput, match=message):
        parse(text.replace(line, broken))


def test_comments_and_blank_lines_are_ignored():
    module = build(load_model("tiny-llama"))
    text = print_module(module).replace("return %x", "# a comment\n\n    return %x  # and one more")
    assert parse(text) == module


def test_the_networkx_view_keeps_both_edges_of_an_op_that_uses_a_value_twice():
    text = """
    module "twice" tp=1 kvp=1 {
      func @double(%x: f32[T, 8]) {
        %y = add %x, %x : f32[T, 8]
        return %y
      }
      program main(%x: f32[T, 8]) {
        %y = @double(%x)
        return %y
      }
    }
    """
    graph = view(verify(parse(text)).functions["double"])
    assert graph.number_of_edges("x", 0) == 2
    assert graph.number_of_edges(0, "return") == 1


def test_one_normal_form_of_sizes():
    assert normal(T * (T + 1)) == normal(T**2 + T)
    assert normal(KV - KV + 3) == 3
    assert isinstance(normal(KV - KV + 3), int)
