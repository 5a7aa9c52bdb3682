KV_DTYPE = "bfloat16"
KV_SHAPE = (1, 64, 16, 16)  # KV heads, pages, tokens of a page, head dim: of K, and of V
SHARED = (2, 41, 64)  # buffers in turn, rows, columns: partial sums that the ranks of tp read of one another



def layer_entry(w, x):
    # %normed, %normed_scale = rms_norm_fp8 %x, %attention_norm {eps=1e-06}
    #   : f8e4m3[T, 64]; f32[T, 1]
    normed, normed_scale = rms_norm_fp8(x, w.attention_norm)
    return normed, normed_scale


def layer(w, next_w, k_cache, v_cache, batch, decode, prefill, comm, x, normed, normed_scale, rot):
    # %qkv = linear_fp8 %normed, %normed_scale, %w_qkv, %w_qkv_scale {dtype="bf16"}
    #   : bf16[T, 128@tp]
    qkv = torch._scaled_mm(
        normed, w.w_qkv.t(), normed_scale, w.w_qkv_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; bf16[KV, 2, 2@tp, 16]
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
        out_dtype=torch.bfloat16, use_fast_accum=True, out=collectives.room(attention_fp8, 0, comm),
    )
    # %ffn_input, %ffn_input_scale, %x_attention = all_reduce_add_rms_norm_fp8 %o, %x, %ffn_norm {axis="tp", eps=1e-06, turn=0}
    #   : f8e4m3[T, 64]; f32[T, 1]; bf16[T, 64]
    ffn_input, ffn_input_scale, x_attention = collectives.all_reduce_add_rms_norm_fp8(o, x, w.ffn_norm, 0, comm)
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
        out_dtype=torch.bfloat16, use_fast_accum=True, out=collectives.room(active, 1, comm),
    )
    # %next_normed, %next_normed_scale, %y = all_reduce_add_rms_norm_fp8 %down, %x_attention, %attention_norm {axis="tp", eps=1e-06, turn=1}
    #   : f8e4m3[T, 64]; f32[T, 1]; bf16[T, 64]
    next_normed, next_normed_scale, y = collectives.all_reduce_add_rms_norm_fp8(down, x_attention, next_w.attention_norm, 1, comm)
    return y, next_normed, next_normed_scale


def layer_last(w, k_cache, v_cache, batch, decode, prefill, comm, x, normed, normed_scale, rot):
    # %qkv = linear_fp8 %normed, %normed_scale, %w_qkv, %w_qkv_scale {dtype="bf16"}
    #   : bf16[T, 128@tp]
    qkv = torch._scaled_mm(
        normed, w.w_qkv.t(), normed_scale, w.w_qkv_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; bf16[KV, 2, 2@tp, 16]
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
        out_dtype=torch.bfloat16, use_fast_accum=True, out=collectives.room(attention_fp8, 0, comm),
    )
    # %ffn_input, %ffn_input_scale, %x_attention = all_reduce_add_rms_norm_fp8 %o, %x, %ffn_norm {axis="tp", eps=1e-06, turn=0}
    #   : f8e4m3[T, 64]; f32[T, 1]; bf16[T, 64]
    ffn_input, ffn_input_scale, x_attention = collectives.all_reduce_add_rms_norm_fp8(o, x, w.ffn_norm, 0, comm)
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
        out_dtype=torch.bfloat16, use_fast_accum=True, out=collectives.room(active, 1, comm),
    )
    # %y = all_reduce_add %x_attention, %down {axis="tp", turn=1} : bf16[T, 64]
    y = collectives.all_reduce_add(x_attention, down, 1, comm)
    return y
