KV_DTYPE = "bfloat16"
KV_SHAPE = (1, 64, 16, 16)  # KV heads, pages, tokens of a page, head dim: of K, and of V
SHARED = (2, 41, 64)  # buffers in turn, rows, columns: partial sums that the ranks of tp read of one another



def layer_entry(w, x):
    # %normed = rms_norm %x, %attention_norm {eps=1e-06} : bf16[T, 64]
    normed = rms_norm(x, w.attention_norm)
    return normed


def layer(w, next_w, k_cache, v_cache, batch, decode, prefill, swaps, comm, x, normed, rot):
    # %qkv = linear %normed, %w_qkv : bf16[T, 128@tp]
    qkv = F.linear(normed, w.w_qkv)
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; bf16[KV@kvp, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %out, %lse = attend %q_rotated, %kv_new : bf16[T, 4@tp, 16]+lse(kvp); f32[T, 4@tp]+lse(kvp)
    out, n = torch.empty_like(q_rotated), batch.num_decode
    lse = torch.empty(q_rotated.shape[:2], dtype=torch.float32, device=q_rotated.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated[:n], k_cache, v_cache, decode, out[:n], lse[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated[n:], k_cache, v_cache, prefill, out[n:], lse[n:])
    # %out_merged, %lse_merged = merge %out, %lse {axis="kvp"} : bf16[T, 4@tp, 16]; f32[T, 4@tp]
    out_merged, _ = collectives.merge_over_kvp(out, lse, swaps, comm.kvp)
    # %attention = merge_heads %out_merged : bf16[T, 64@tp]
    attention = out_merged.flatten(1)
    # %o = linear %attention, %w_o : bf16[T, 64]+sum(tp)
    o = torch.mm(attention, w.w_o.t(), out=collectives.room(attention, 0, comm))
    # %ffn_input, %x_attention = all_reduce_add_rms_norm %o, %x, %ffn_norm {axis="tp", eps=1e-06, turn=0}
    #   : bf16[T, 64]; bf16[T, 64]
    ffn_input, x_attention = collectives.all_reduce_add_rms_norm(o, x, w.ffn_norm, 0, comm)
    # %gate_up = linear %ffn_input, %w_gate_up : bf16[T, 192@tp]
    gate_up = F.linear(ffn_input, w.w_gate_up)
    # %active = swiglu %gate_up : bf16[T, 96@tp]
    active = swiglu(gate_up)
    # %down = linear %active, %w_down : bf16[T, 64]+sum(tp)
    down = torch.mm(active, w.w_down.t(), out=collectives.room(active, 1, comm))
    # %next_normed, %y = all_reduce_add_rms_norm %down, %x_attention, %attention_norm {axis="tp", eps=1e-06, turn=1}
    #   : bf16[T, 64]; bf16[T, 64]
    next_normed, y = collectives.all_reduce_add_rms_norm(down, x_attention, next_w.attention_norm, 1, comm)
    return y, next_normed


def layer_last(w, k_cache, v_cache, batch, decode, prefill, swaps, comm, x, normed, rot):
    # %qkv = linear %normed, %w_qkv : bf16[T, 128@tp]
    qkv = F.linear(normed, w.w_qkv)
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; bf16[KV@kvp, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %out, %lse = attend %q_rotated, %kv_new : bf16[T, 4@tp, 16]+lse(kvp); f32[T, 4@tp]+lse(kvp)
    out, n = torch.empty_like(q_rotated), batch.num_decode
    lse = torch.empty(q_rotated.shape[:2], dtype=torch.float32, device=q_rotated.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated[:n], k_cache, v_cache, decode, out[:n], lse[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated[n:], k_cache, v_cache, prefill, out[n:], lse[n:])
    # %out_merged, %lse_merged = merge %out, %lse {axis="kvp"} : bf16[T, 4@tp, 16]; f32[T, 4@tp]
    out_merged, _ = collectives.merge_over_kvp(out, lse, swaps, comm.kvp)
    # %attention = merge_heads %out_merged : bf16[T, 64@tp]
    attention = out_merged.flatten(1)
    # %o = linear %attention, %w_o : bf16[T, 64]+sum(tp)
    o = torch.mm(attention, w.w_o.t(), out=collectives.room(attention, 0, comm))
    # %ffn_input, %x_attention = all_reduce_add_rms_norm %o, %x, %ffn_norm {axis="tp", eps=1e-06, turn=0}
    #   : bf16[T, 64]; bf16[T, 64]
    ffn_input, x_attention = collectives.all_reduce_add_rms_norm(o, x, w.ffn_norm, 0, comm)
    # %gate_up = linear %ffn_input, %w_gate_up : bf16[T, 192@tp]
    gate_up = F.linear(ffn_input, w.w_gate_up)
    # %active = swiglu %gate_up : bf16[T, 96@tp]
    active = swiglu(gate_up)
    # %down = linear %active, %w_down : bf16[T, 64]+sum(tp)
    down = torch.mm(active, w.w_down.t(), out=collectives.room(active, 1, comm))
    # %y = all_reduce_add %x_attention, %down {axis="tp", turn=1} : bf16[T, 64]
    y = collectives.all_reduce_add(x_attention, down, 1, comm)
    return y
