"""The oracle: for any model, layout, split, chunking and batch, the planned module computes the same."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemoc.ir.build import build
from mnemoc.ir.interpret import Chunk, Interpreter
from mnemoc.ir.model import load_model
from mnemoc.ir.ops.attention import merge_partials
from mnemoc.ir.passes import carry, fuse, lower, one_shot, overlap, shard, split_stages
from mnemoc.ir.verify import verify

TINY = load_model("tiny-llama")


@st.composite
def models(draw):
    kv_heads, group, dim = draw(
        st.sampled_from([(1, 4, 8), (2, 2, 8), (4, 1, 4), (4, 2, 8), (2, 6, 4)])
    )
    return dataclasses.replace(
        TINY,
        num_layers=draw(st.integers(1, 3)),
        hidden=16,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=dim,
        ffn=8 * draw(st.sampled_from([1, 3])),
        vocab=draw(st.sampled_from([32, 33])),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
    )


def random_weights(spec, seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape) * 0.2 + (len(shape) == 1)
        for name, shape in spec.tensors().items()
    }


def apply(module, layers, tp, kvp, ffn, split, *, summed):
    sharded = verify(shard(module, tp=tp, kvp=kvp, ffn=ffn))
    names = [f"stage_{i}" for i in range(len(split))]
    assert sum(split) == layers
    halved = verify(overlap(verify(fuse(sharded))))
    carried = verify(carry(verify(split_stages(halved, split, names))))
    return verify(lower(verify(one_shot(carried)) if summed else carried, "cpu"))


@st.composite
def layouts(draw):
    spec = draw(models())
    tp, kvp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    cut = draw(st.integers(1, spec.num_layers))
    split = [cut, spec.num_layers - cut] if cut < spec.num_layers else [spec.num_layers]
    divides = spec.num_heads % (tp * kvp) == spec.ffn % (tp * kvp) == 0
    ffn = draw(st.sampled_from(["repeated", "helix"])) if divides else "repeated"
    return spec, tp, kvp, ffn, split


@settings(max_examples=40)
@given(
    layouts(),
    st.integers(1, 7),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_planned_module_computes_what_the_source_does(
    case, chunk, shard_tokens, halved, summed, seed
):
    """In whole layers or in halves, with sums over tp by themselves or in the ops that read them."""
    spec, tp, kvp, ffn, split = case
    rng = np.random.default_rng(seed)
    weights = random_weights(spec, seed)
    prompts = [tuple(map(int, rng.integers(0, spec.vocab, n))) for n in rng.integers(1, 17, 2)]
    module = build(spec)
    expected = [
        Interpreter(module, weights).run([Chunk(0, 0, ids)], range(len(ids))) for ids in prompts
    ]
    planned = apply(module, spec.num_layers, tp, kvp, ffn, split, summed=summed)
    runner = Interpreter(
        planned, weights, owner=lambda sequence, n: (n // shard_tokens + sequence) % kvp
    )
    for start in range(0, max(map(len, prompts)), chunk):  # ragged: the shorter one ends first
        chunks = [
            Chunk(i, start, ids[start : start + chunk])
            for i, ids in enumerate(prompts)
            if start < len(ids)
        ]
        rows = sum(len(c.ids) for c in chunks)
        logits = runner.run(chunks, range(rows), halved=halved and rows > 1)
        wanted = np.concatenate([expected[c.sequence][start : start + len(c.ids)] for c in chunks])
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-10)


def test_the_source_is_the_model_that_transformers_runs():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = dataclasses.replace(TINY, num_layers=2, tied_embeddings=False)
    config = LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        num_hidden_layers=2,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps,
        rope_theta=spec.rope.theta,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ids = tuple(range(3, 40))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    logits = Interpreter(build(spec), weights).run([Chunk(0, 0, ids)], range(len(ids)))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_merging_any_split_of_the_keys_is_attention_over_all(seed, sizes):
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    scores, values = rng.normal(size=(1, 2, total)) * 5, rng.normal(size=(total, 1, 4))

    def attend(low, high):
        s, v = scores[..., low:high], values[low:high, 0]
        if low == high:
            return np.zeros((2, 1, 4)), np.full((2, 1), -np.inf)
        weights = np.exp(s[0] - s[0].max(axis=1, keepdims=True))
        lse = s[0].max(axis=1) + np.log(weights.sum(axis=1))
        return (weights / weights.sum(axis=1, keepdims=True) @ v)[:, None], lse[:, None]

    ends = np.cumsum([0, *sizes])
    out, lse = merge_partials([attend(a, b) for a, b in pairwise(ends)])
    whole, whole_lse = attend(0, total)
    np.testing.assert_allclose(out, whole, atol=1e-12)
    np.testing.assert_allclose(lse, whole_lse, atol=1e-12)
