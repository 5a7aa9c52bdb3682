"""ModelSpec → Module: what one step of a dense decoder computes, unsharded and unfused.

program main(ids, pos, last):
    x      = embed(ids)
    rot    = rotation(pos)
    x      = layer(x, rot)        once per layer
    logits = head(x, last)
"""

from __future__ import annotations

from ..artifact import FP8
from .builder import FunctionBuilder
from .graph import Call, Function, Module, Program, Value
from .model import ModelSpec
from .sizes import KV, R, T
from .types import DTYPE_NAMES, E4M3, tensor

UNSHARDED = {"tp": 1, "kvp": 1}


def build(spec: ModelSpec, dtype: str | None = None, kv_cache: str = "auto") -> Module:
    """The module of a model.

    dtype: ("float32", …) in place of the checkpoint's element type; kv_cache: "auto" for that type, or "fp8"
    """
    element = DTYPE_NAMES[dtype or spec.dtype]
    kept = E4M3 if kv_cache == FP8 else element
    layer = _layer(spec, element, kept)
    functions = (_embed(spec, element), _rotary(spec), layer, _head(spec, element))
    program = Program(
        "main",
        (
            Value("ids", tensor("i64", T)),
            Value("pos", tensor("i64", T)),
            Value("last", tensor("i64", R)),
        ),
        (
            Call("embed", ("ids",), ("x0",)),
            Call("rotation", ("pos",), ("rot",)),
            Call("layer", ("x0", "rot"), ("x1",), (0, spec.num_layers)),
            Call("head", ("x1", "last"), ("logits",)),
        ),
        ("logits",),
    )
    return Module(spec.name, {f.name: f for f in functions}, (program,), UNSHARDED)


def _embed(spec: ModelSpec, element: str) -> Function:
    ids = Value("ids", tensor("i64", T))
    f = FunctionBuilder("embed", (ids,), UNSHARDED)
    table = _param(f, "embedding", element, "model.embed_tokens.weight", spec.vocab, spec.hidden)
    return f.finish(f.add("embed", "x", ids, table))


def _rotary(spec: ModelSpec) -> Function:
    pos = Value("pos", tensor("i64", T))
    f = FunctionBuilder("rotation", (pos,), UNSHARDED)
    frequencies = spec.rope.inv_freq(spec.head_dim)
    rot = f.add("rotary", "rot", pos, inv_freq=frequencies, factor=spec.rope.attention_factor)
    return f.finish(rot)


def _layer(spec: ModelSpec, element: str, kept: str) -> Function:
    """kept: element type of the KV cache."""
    x = Value("x", tensor(element, T, spec.hidden))
    rot = Value("rot", tensor("f32", T, 2, spec.head_dim // 2))
    f = FunctionBuilder("layer", (x, rot), UNSHARDED)
    hidden, dim, eps = spec.hidden, spec.head_dim, spec.norm_eps
    prefix = "model.layers.{layer}."

    def weight(name: str, source: str, *shape: int) -> Value:
        return _param(f, name, element, f"{prefix}{source}", *shape)

    def project(name: str, heads: int) -> Value:
        """Rows to [T, heads, d]: one of q, k, v, normalised per head where the model does so."""
        width = heads * dim
        operands = [normed, weight(f"w_{name}", f"self_attn.{name}_proj.weight", width, hidden)]
        if spec.qkv_bias:
            operands.append(weight(f"b_{name}", f"self_attn.{name}_proj.bias", width))
        y = f.add("split_heads", f"{name}_heads", f.add("linear", name, *operands), heads=heads)
        if spec.qk_norm and name != "v":
            scale = weight(f"{name}_norm", f"self_attn.{name}_norm.weight", dim)
            y = f.add("rms_norm", f"{name}_normed", y, scale, eps=eps)
        return y

    attention_norm = weight("attention_norm", "input_layernorm.weight", hidden)
    normed = f.add("rms_norm", "normed", x, attention_norm, eps=eps)
    q, k = (
        f.add("rope", f"{name}_rotated", project(name, heads), rot)
        for name, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads))
    )
    v = project("v", spec.num_kv_heads)
    cache = f.declare("cache", "kv", tensor(kept, KV, 2, spec.num_kv_heads, dim))
    kv = f.add("append", "kv_new", cache, k, v)
    out, _ = f.add_many("attend", ("out", "lse"), q, kv)
    flat = f.add("merge_heads", "attention", out)
    w_o = weight("w_o", "self_attn.o_proj.weight", hidden, spec.num_heads * dim)
    x = f.add("add", "x_attention", x, f.add("linear", "o", flat, w_o))

    ffn_norm = weight("ffn_norm", "post_attention_layernorm.weight", hidden)
    normed = f.add("rms_norm", "ffn_input", x, ffn_norm, eps=eps)
    gate = f.add(
        "linear", "gate", normed, weight("w_gate", "mlp.gate_proj.weight", spec.ffn, hidden)
    )
    up = f.add("linear", "up", normed, weight("w_up", "mlp.up_proj.weight", spec.ffn, hidden))
    active = f.add("silu_mul", "active", gate, up)
    w_down = weight("w_down", "mlp.down_proj.weight", hidden, spec.ffn)
    return f.finish(f.add("add", "y", x, f.add("linear", "down", active, w_down)))


def _head(spec: ModelSpec, element: str) -> Function:
    x = Value("x", tensor(element, T, spec.hidden))
    last = Value("last", tensor("i64", R))
    f = FunctionBuilder("head", (x, last), UNSHARDED)
    rows = f.add("select", "rows", x, last)
    final_norm = _param(f, "final_norm", element, "model.norm.weight", spec.hidden)
    normed = f.add("rms_norm", "normed", rows, final_norm, eps=spec.norm_eps)
    source = "model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    w_head = _param(f, "w_head", element, source, spec.vocab, spec.hidden)
    logits = f.add("linear", "logits", normed, w_head)
    return f.finish(
        logits if element == "f32" else f.add("cast", "logits_f32", logits, dtype="f32")
    )


def _param(f: FunctionBuilder, name: str, element: str, source: str, *shape: int) -> Value:
    return f.declare("param", name, tensor(element, *shape), sources=(source,))
