DTYPE = "bfloat16"  # of weights and activations
KV_DTYPE = "float8_e4m3fn"
KV_SHAPE = (1, 64, 16, 16)  # KV heads, pages, tokens of a page, head dim: of K, and of V

# What a rank loads: each source is cut along `dim` into one piece per rank of `axis` (None: whole), or one for
# as many neighbouring ranks as its `copies` says; the rank's pieces of all sources are joined along dim 0.
PARAMETERS = (
    {
        "name": "embedding",
        "per_layer": False,
        "shape": (64, 64),
        "dtype": "bfloat16",
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
        "dtype": "bfloat16",
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
        "dtype": "float8_e4m3fn",
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
        "name": "w_qkv_scale",
        "per_layer": True,
        "shape": (64, 1),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.self_attn.q_proj.weight_scale",
            "model.layers.{layer}.self_attn.k_proj.weight_scale",
            "model.layers.{layer}.self_attn.v_proj.weight_scale",
        ],
        "copies": [1, 1, 1],
        "dim": 0,
        "axis": "tp",
    },
    {
        "name": "b_qkv",
        "per_layer": True,
        "shape": (64,),
        "dtype": "bfloat16",
        "sources": [
            "model.layers.{layer}.self_attn.q_proj.bias",
            "model.layers.{layer}.self_attn.k_proj.bias",
            "model.layers.{layer}.self_attn.v_proj.bias",
        ],
        "copies": [1, 1, 1],
        "dim": 0,
        "axis": "tp",
    },
    {
        "name": "q_norm",
        "per_layer": True,
        "shape": (16,),
        "dtype": "bfloat16",
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
        "dtype": "bfloat16",
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
        "shape": (64, 32),
        "dtype": "float8_e4m3fn",
        "sources": [
            "model.layers.{layer}.self_attn.o_proj.weight",
        ],
        "copies": [1],
        "dim": 1,
        "axis": "tp",
    },
    {
        "name": "w_o_scale",
        "per_layer": True,
        "shape": (64, 1),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.self_attn.o_proj.weight_scale",
        ],
        "copies": [1],
        "dim": None,
        "axis": None,
    },
    {
        "name": "ffn_norm",
        "per_layer": True,
        "shape": (64,),
        "dtype": "bfloat16",
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
        "shape": (96, 64),
        "dtype": "float8_e4m3fn",
        "sources": [
            "model.layers.{layer}.mlp.gate_proj.weight",
            "model.layers.{layer}.mlp.up_proj.weight",
        ],
        "copies": [1, 1],
        "dim": 0,
        "axis": "tp",
    },
    {
        "name": "w_gate_up_scale",
        "per_layer": True,
        "shape": (96, 1),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.mlp.gate_proj.weight_scale",
            "model.layers.{layer}.mlp.up_proj.weight_scale",
        ],
        "copies": [1, 1],
        "dim": 0,
        "axis": "tp",
    },
    {
        "name": "w_down",
        "per_layer": True,
        "shape": (64, 48),
        "dtype": "float8_e4m3fn",
        "sources": [
            "model.layers.{layer}.mlp.down_proj.weight",
        ],
        "copies": [1],
        "dim": 1,
        "axis": "tp",
    },
    {
        "name": "w_down_scale",
        "per_layer": True,
        "shape": (64, 1),
        "dtype": "float32",
        "sources": [
            "model.layers.{layer}.mlp.down_proj.weight_scale",
        ],
        "copies": [1],
        "dim": None,
        "axis": None,
    },
    {
        "name": "final_norm",
        "per_layer": False,
        "shape": (64,),
        "dtype": "bfloat16",
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
        "dtype": "bfloat16",
        "sources": [
            "lm_head.weight",
        ],
        "copies": [1],
        "dim": 0,
        "axis": "tp",
    },
)


def embed(w, comm, ids):
    # %x = embed %ids, %embedding : bf16[T, 64]+sum(tp)
    row = ids - comm.tp_rank * w.embedding.shape[0]
    mine = (row >= 0) & (row < w.embedding.shape[0])  # tokens of this rank's part
    x = F.embedding(torch.where(mine, row, 0), w.embedding) * mine.unsqueeze(1)
    # %x_reduced = all_reduce %x {axis="tp"} : bf16[T, 64]
    dist.all_reduce(x, group=comm.tp)
    x_reduced = x
    return x_reduced


def rotation(pos):
    # %rot = rotary %pos {factor=1.0} : f32[T, 2, 8]
    rot = rotary(pos)
    return rot


def layer_entry(w, x):
    # %normed, %normed_scale = rms_norm_fp8 %x, %attention_norm {eps=1e-06}
    #   : f8e4m3[T, 64]; f32[T, 1]
    normed, normed_scale = rms_norm_fp8(x, w.attention_norm)
    return normed, normed_scale


def layer(w, next_w, k_cache, v_cache, batch, decode, prefill, comm, x, normed, normed_scale, rot):
    # %qkv = linear_fp8 %normed, %normed_scale, %w_qkv, %w_qkv_scale, %b_qkv {dtype="bf16"}
    #   : bf16[T, 128@tp]
    qkv = torch._scaled_mm(
        normed, w.w_qkv.t(), normed_scale, w.w_qkv_scale.t(), w.b_qkv,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; f8e4m3[KV, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %out, %lse = attend %q_rotated, %kv_new : bf16[T, 4@tp, 16]; f32[T, 4@tp]
    out, n = torch.empty_like(q_rotated), batch.num_decode
    lse = torch.empty(q_rotated.shape[:2], dtype=torch.float32, device=q_rotated.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated[:n], k_cache, v_cache, decode, out[:n], lse[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated[n:], k_cache, v_cache, prefill, out[n:], lse[n:])
    # %attention = merge_heads %out : bf16[T, 64@tp]
    attention = out.flatten(1)
    # %attention_fp8, %attention_scale = quantize_fp8 %attention : f8e4m3[T, 64@tp]; f32[T, 2@tp]
    attention_fp8, attention_scale = quantize_fp8(attention)
    # %o = linear_fp8 %attention_fp8, %attention_scale, %w_o, %w_o_scale {dtype="bf16"}
    #   : bf16[T, 64]+sum(tp)
    o = torch._scaled_mm(
        attention_fp8, w.w_o.t(), attention_scale, w.w_o_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %o_reduced = all_reduce %o {axis="tp"} : bf16[T, 64]
    dist.all_reduce(o, group=comm.tp)
    o_reduced = o
    # %ffn_input, %ffn_input_scale, %x_attention = add_rms_norm_fp8 %o_reduced, %x, %ffn_norm {eps=1e-06}
    #   : f8e4m3[T, 64]; f32[T, 1]; bf16[T, 64]
    ffn_input, ffn_input_scale, x_attention = add_rms_norm_fp8(o_reduced, x, w.ffn_norm)
    # %gate_up = linear_fp8 %ffn_input, %ffn_input_scale, %w_gate_up, %w_gate_up_scale {dtype="bf16"}
    #   : bf16[T, 192@tp]
    gate_up = torch._scaled_mm(
        ffn_input, w.w_gate_up.t(), ffn_input_scale, w.w_gate_up_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %active, %active_scale = swiglu_fp8 %gate_up : f8e4m3[T, 96@tp]; f32[T, 2@tp]
    active, active_scale = swiglu_fp8(gate_up)
    # %down = linear_fp8 %active, %active_scale, %w_down, %w_down_scale {dtype="bf16"}
    #   : bf16[T, 64]+sum(tp)
    down = torch._scaled_mm(
        active, w.w_down.t(), active_scale, w.w_down_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %down_reduced = all_reduce %down {axis="tp"} : bf16[T, 64]
    dist.all_reduce(down, group=comm.tp)
    down_reduced = down
    # %next_normed, %next_normed_scale, %y = add_rms_norm_fp8 %down_reduced, %x_attention, %attention_norm {eps=1e-06}
    #   : f8e4m3[T, 64]; f32[T, 1]; bf16[T, 64]
    next_normed, next_normed_scale, y = add_rms_norm_fp8(down_reduced, x_attention, next_w.attention_norm)
    return y, next_normed, next_normed_scale


def layer_last(w, k_cache, v_cache, batch, decode, prefill, comm, x, normed, normed_scale, rot):
    # %qkv = linear_fp8 %normed, %normed_scale, %w_qkv, %w_qkv_scale, %b_qkv {dtype="bf16"}
    #   : bf16[T, 128@tp]
    qkv = torch._scaled_mm(
        normed, w.w_qkv.t(), normed_scale, w.w_qkv_scale.t(), w.b_qkv,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; f8e4m3[KV, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %out, %lse = attend %q_rotated, %kv_new : bf16[T, 4@tp, 16]; f32[T, 4@tp]
    out, n = torch.empty_like(q_rotated), batch.num_decode
    lse = torch.empty(q_rotated.shape[:2], dtype=torch.float32, device=q_rotated.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated[:n], k_cache, v_cache, decode, out[:n], lse[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated[n:], k_cache, v_cache, prefill, out[n:], lse[n:])
    # %attention = merge_heads %out : bf16[T, 64@tp]
    attention = out.flatten(1)
    # %attention_fp8, %attention_scale = quantize_fp8 %attention : f8e4m3[T, 64@tp]; f32[T, 2@tp]
    attention_fp8, attention_scale = quantize_fp8(attention)
    # %o = linear_fp8 %attention_fp8, %attention_scale, %w_o, %w_o_scale {dtype="bf16"}
    #   : bf16[T, 64]+sum(tp)
    o = torch._scaled_mm(
        attention_fp8, w.w_o.t(), attention_scale, w.w_o_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %o_reduced = all_reduce %o {axis="tp"} : bf16[T, 64]
    dist.all_reduce(o, group=comm.tp)
    o_reduced = o
    # %ffn_input, %ffn_input_scale, %x_attention = add_rms_norm_fp8 %o_reduced, %x, %ffn_norm {eps=1e-06}
    #   : f8e4m3[T, 64]; f32[T, 1]; bf16[T, 64]
    ffn_input, ffn_input_scale, x_attention = add_rms_norm_fp8(o_reduced, x, w.ffn_norm)
    # %gate_up = linear_fp8 %ffn_input, %ffn_input_scale, %w_gate_up, %w_gate_up_scale {dtype="bf16"}
    #   : bf16[T, 192@tp]
    gate_up = torch._scaled_mm(
        ffn_input, w.w_gate_up.t(), ffn_input_scale, w.w_gate_up_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %active, %active_scale = swiglu_fp8 %gate_up : f8e4m3[T, 96@tp]; f32[T, 2@tp]
    active, active_scale = swiglu_fp8(gate_up)
    # %down = linear_fp8 %active, %active_scale, %w_down, %w_down_scale {dtype="bf16"}
    #   : bf16[T, 64]+sum(tp)
    down = torch._scaled_mm(
        active, w.w_down.t(), active_scale, w.w_down_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %down_reduced = all_reduce %down {axis="tp"} : bf16[T, 64]
    dist.all_reduce(down, group=comm.tp)
    down_reduced = down
    # %y = add %x_attention, %down_reduced : bf16[T, 64]
    y = x_attention.add_(down_reduced)
    return y

