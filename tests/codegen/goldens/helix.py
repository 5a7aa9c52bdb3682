# What a rank loads: each source is cut along `dim` into one piece per rank of `axis` (None: whole), or one for
# as many neighbouring ranks as its `copies` says; the rank's pieces of all sources are joined along dim 0.
# The axis tp_kvp is all ranks of the stage: a tp rank's piece, cut once more over the KVP groups.
PARAMETERS = (
    {
        "name": "embedding",
        "per_layer": False,
        "shape": (64, 64),
        "dtype": "float32",
        "sources": [
            "model.embed_tokens.weight",
        ],
        "copies": [1],
        "dim": 0,
        "axis": "tp",
    },
    {
        "name": "attention_norm",
        "per_layer": True,
        "shape": (64,),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.input_layernorm.weight",
        ],
        "copies": [1],
        "dim": None,
        "axis": None,
    },
    {
        "name": "w_qkv",
        "per_layer": True,
        "shape": (64, 64),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ],
        "copies": [1, 1, 1],
        "dim": 0,
        "axis": "tp",
    },
    {
        "name": "q_norm",
        "per_layer": True,
        "shape": (16,),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.self_attn.q_norm.weight",
        ],
        "copies": [1],
        "dim": None,
        "axis": None,
    },
    {
        "name": "k_norm",
        "per_layer": True,
        "shape": (16,),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.self_attn.k_norm.weight",
        ],
        "copies": [1],
        "dim": None,
        "axis": None,
    },
    {
        "name": "w_o",
        "per_layer": True,
        "shape": (64, 16),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.self_attn.o_proj.weight",
        ],
        "copies": [1],
        "dim": 1,
        "axis": "tp_kvp",
    },
    {
        "name": "ffn_norm",
        "per_layer": True,
        "shape": (64,),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.post_attention_layernorm.weight",
        ],
        "copies": [1],
        "dim": None,
        "axis": None,
    },
    {
        "name": "w_gate_up",
        "per_layer": True,
        "shape": (48, 64),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.mlp.gate_proj.weight",
            "model.layers.{layer}.mlp.up_proj.weight",
        ],
        "copies": [1, 1],
        "dim": 0,
        "axis": "tp_kvp",
    },
    {
        "name": "w_down",
        "per_layer": True,
        "shape": (64, 24),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.mlp.down_proj.weight",
        ],
        "copies": [1],
        "dim": 1,
        "axis": "tp_kvp",
    },
    {
        "name": "final_norm",
        "per_layer": False,
        "shape": (64,),
        "dtype": "float32",
        "sources": [
            "model.norm.weight",
        ],
        "copies": [1],
        "dim": None,
        "axis": None,
    },
    {
        "name": "w_head",
        "per_layer": False,
        "shape": (64, 64),
        "dtype": "float32",
        "sources": [
            "lm_head.weight",
        ],
        "copies": [1],
        "dim": 0,
        "axis": "tp",
    },
)


def embed(w, comm, ids):
    # %x = embed %ids, %embedding : f32[T, 64]+sum(tp)
    row = ids - comm.tp_rank * w.embedding.shape[0]
    mine = (row >= 0) & (row < w.embedding.shape[0])  # tokens of this rank's part
    x = F.embedding(torch.where(mine, row, 0), w.embedding) * mine.unsqueeze(1)
    # %x_reduced = all_reduce %x {axis="tp"} : f32[T, 64]
    dist.all_reduce(x, group=comm.tp)
    x_reduced = x
    return x_reduced


def rotation(pos):
    # %rot = rotary %pos {factor=1.0} : f32[T, 2, 8]
    rot = rotary(pos)
    return rot


def layer_entry(w, x):
    # %normed = rms_norm %x, %attention_norm {eps=1e-06} : f32[T, 64]
    normed = rms_norm(x, w.attention_norm)
    return normed


def layer(w, next_w, k_cache, v_cache, batch, decode, prefill, swaps, comm, x, normed, rot):
    # %qkv = linear %normed, %w_qkv : f32[T, 128@tp]
    qkv = linear(normed, w.w_qkv)
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : f32[T, 4@tp, 16]; f32[KV@kvp, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %out, %lse = attend %q_rotated, %kv_new : f32[T, 4@tp, 16]+lse(kvp); f32[T, 4@tp]+lse(kvp)
    out, n = torch.empty_like(q_rotated), batch.num_decode
    lse = torch.empty(q_rotated.shape[:2], dtype=torch.float32, device=q_rotated.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated[:n], k_cache, v_cache, decode, out[:n], lse[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated[n:], k_cache, v_cache, prefill, out[n:], lse[n:])
    # %out_merged, %lse_merged = merge_scatter %out, %lse {axis="kvp"}
    #   : f32[T, 4@tp_kvp, 16]; f32[T, 4@tp_kvp]
    out_merged, lse_merged = collectives.merge_scatter_over_kvp(out, lse, swaps, comm.kvp)
    # %attention = merge_heads %out_merged : f32[T, 64@tp_kvp]
    attention = out_merged.flatten(1)
    # %o = linear %attention, %w_o : f32[T, 64]+sum(tp_kvp)
    o = linear(attention, w.w_o)
    # %o_reduced = all_reduce %o {axis="tp_kvp"} : f32[T, 64]
    dist.all_reduce(o, group=comm.tp_kvp)
    o_reduced = o
    # %ffn_input, %x_attention = add_rms_norm %o_reduced, %x, %ffn_norm {eps=1e-06}
    #   : f32[T, 64]; f32[T, 64]
    ffn_input, x_attention = add_rms_norm(o_reduced, x, w.ffn_norm)
    # %gate_up = linear %ffn_input, %w_gate_up : f32[T, 192@tp_kvp]
    gate_up = linear(ffn_input, w.w_gate_up)
    # %active = swiglu %gate_up : f32[T, 96@tp_kvp]
    active = swiglu(gate_up)
    # %down = linear %active, %w_down : f32[T, 64]+sum(tp_kvp)
    down = linear(active, w.w_down)
    # %down_reduced = all_reduce %down {axis="tp_kvp"} : f32[T, 64]
    dist.all_reduce(down, group=comm.tp_kvp)
    down_reduced = down
    # %next_normed, %y = add_rms_norm %down_reduced, %x_attention, %attention_norm {eps=1e-06}
    #   : f32[T, 64]; f32[T, 64]
    next_normed, y = add_rms_norm(down_reduced, x_attention, next_w.attention_norm)
    return y, next_normed


def layer_last(w, k_cache, v_cache, batch, decode, prefill, swaps, comm, x, normed, rot):
    # %qkv = linear %normed, %w_qkv : f32[T, 128@tp]
    qkv = linear(normed, w.w_qkv)
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : f32[T, 4@tp, 16]; f32[KV@kvp, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %out, %lse = attend %q_rotated, %kv_new : f32[T, 4@tp, 16]+lse(kvp); f32[T, 4@tp]+lse(kvp)
    out, n = torch.empty_like(q_rotated), batch.num_decode
    lse = torch.empty(q_rotated.shape[:2], dtype=torch.float32, device=q_rotated.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated[:n], k_cache, v_cache, decode, out[:n], lse[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated[n:], k_cache, v_cache, prefill, out[n:], lse[n:])
    # %out_merged, %lse_merged = merge_scatter %out, %lse {axis="kvp"}
    #   : f32[T, 4@tp_kvp, 16]; f32[T, 4@tp_kvp]
    out_merged, lse_merged = collectives.merge_scatter_over_kvp(out, lse, swaps, comm.kvp)
    # %attention = merge_heads %out_merged : f32[T, 64@tp_kvp]
    attention = out_merged.flatten(1)
    # %o = linear %attention, %w_o : f32[T, 64]+sum(tp_kvp)
    o = linear(attention, w.w_o)
    # %o_reduced = all_reduce %o {axis="tp_kvp"} : f32[T, 64]
    dist.all_reduce(o, group=comm.tp_kvp)
    o_reduced = o
    # %ffn_input, %x_attention = add_rms_norm %o_reduced, %x, %ffn_norm {eps=1e-06}
    #   : f32[T, 64]; f32[T, 64]
    ffn_input, x_attention = add_rms_norm(o_reduced, x, w.ffn_norm)
    # %gate_up = linear %ffn_input, %w_gate_up : f32[T, 192@tp_kvp]
    gate_up = linear(ffn_input, w.w_gate_up)
    # %active = swiglu %gate_up : f32[T, 96@tp_kvp]
    active = swiglu(gate_up)
    # %down = linear %active, %w_down : f32[T, 64]+sum(tp_kvp)
    down = linear(active, w.w_down)
    # %down_reduced = all_reduce %down {axis="tp_kvp"} : f32[T, 64]
    dist.all_reduce(down, group=comm.tp_kvp)
    down_reduced = down
    # %y = add %x_attention, %down_reduced : f32[T, 64]
    y = x_attention.add_(down_reduced)
    return y

