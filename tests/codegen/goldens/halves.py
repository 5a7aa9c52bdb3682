def layer_halves(w, next_w, k_cache, v_cache, batch, decode, prefill, swaps, second_prefill, second_swaps, comm, x, normed, rot):
    # %qkv = linear %normed, %w_qkv : bf16[T, 128@tp]
    qkv = F.linear(normed, w.w_qkv)
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; bf16[KV@kvp, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %q_rotated_first, %q_rotated_second = halve %q_rotated
    #   : bf16[T/2, 4@tp, 16]; bf16[T/2, 4@tp, 16]
    q_rotated_first, q_rotated_second = q_rotated.split(batch.halves)
    # %x_first, %x_second = halve %x : bf16[T/2, 64]; bf16[T/2, 64]
    x_first, x_second = x.split(batch.halves)
    # %out_first, %lse_first = attend %q_rotated_first, %kv_new {half=0}
    #   : bf16[T/2, 4@tp, 16]+lse(kvp); f32[T/2, 4@tp]+lse(kvp)
    out_first, n = torch.empty_like(q_rotated_first), batch.num_decode
    lse_first = torch.empty(q_rotated_first.shape[:2], dtype=torch.float32, device=q_rotated_first.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated_first[:n], k_cache, v_cache, decode, out_first[:n], lse_first[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated_first[n:], k_cache, v_cache, prefill, out_first[n:], lse_first[n:])
    # %out_first_sent, %lse_first_sent = exchange %out_first, %lse_first {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]+sent(kvp); f32[T/2, 4@tp]+sent(kvp)
    out_first_sent = collectives.exchange_over_kvp(out_first, lse_first, swaps, comm.kvp)
    # %out_second, %lse_second = attend %q_rotated_second, %kv_new {half=1}
    #   : bf16[T/2, 4@tp, 16]+lse(kvp); f32[T/2, 4@tp]+lse(kvp)
    out_second = torch.empty_like(q_rotated_second)
    lse_second = torch.empty(q_rotated_second.shape[:2], dtype=torch.float32, device=q_rotated_second.device)
    attention_prefill.attention_prefill(q_rotated_second, k_cache, v_cache, second_prefill, out_second, lse_second)
    # %out_second_sent, %lse_second_sent = exchange %out_second, %lse_second {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]+sent(kvp); f32[T/2, 4@tp]+sent(kvp)
    out_second_sent = collectives.exchange_over_kvp(out_second, lse_second, second_swaps, comm.kvp)
    # %out_merged_first, %lse_merged_first = merge %out_first_sent, %lse_first_sent {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]; f32[T/2, 4@tp]
    out_merged_first, _ = collectives.merge_sent(out_first_sent)
    # %attention_first = merge_heads %out_merged_first : bf16[T/2, 64@tp]
    attention_first = out_merged_first.flatten(1)
    # %o_first = linear %attention_first, %w_o : bf16[T/2, 64]+sum(tp)
    o_first = F.linear(attention_first, w.w_o)
    # %o_reduced_first = all_reduce %o_first {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(o_first, group=comm.tp)
    o_reduced_first = o_first
    # %ffn_input_first, %x_attention_first = add_rms_norm %o_reduced_first, %x_first, %ffn_norm {eps=1e-06}
    #   : bf16[T/2, 64]; bf16[T/2, 64]
    ffn_input_first, x_attention_first = add_rms_norm(o_reduced_first, x_first, w.ffn_norm)
    # %gate_up_first = linear %ffn_input_first, %w_gate_up : bf16[T/2, 192@tp]
    gate_up_first = F.linear(ffn_input_first, w.w_gate_up)
    # %active_first = swiglu %gate_up_first : bf16[T/2, 96@tp]
    active_first = swiglu(gate_up_first)
    # %down_first = linear %active_first, %w_down : bf16[T/2, 64]+sum(tp)
    down_first = F.linear(active_first, w.w_down)
    # %down_reduced_first = all_reduce %down_first {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(down_first, group=comm.tp)
    down_reduced_first = down_first
    # %y_first = add %x_attention_first, %down_reduced_first : bf16[T/2, 64]
    y_first = x_attention_first.add_(down_reduced_first)
    # %out_merged_second, %lse_merged_second = merge %out_second_sent, %lse_second_sent {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]; f32[T/2, 4@tp]
    out_merged_second, _ = collectives.merge_sent(out_second_sent)
    # %attention_second = merge_heads %out_merged_second : bf16[T/2, 64@tp]
    attention_second = out_merged_second.flatten(1)
    # %o_second = linear %attention_second, %w_o : bf16[T/2, 64]+sum(tp)
    o_second = F.linear(attention_second, w.w_o)
    # %o_reduced_second = all_reduce %o_second {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(o_second, group=comm.tp)
    o_reduced_second = o_second
    # %ffn_input_second, %x_attention_second = add_rms_norm %o_reduced_second, %x_second, %ffn_norm {eps=1e-06}
    #   : bf16[T/2, 64]; bf16[T/2, 64]
    ffn_input_second, x_attention_second = add_rms_norm(o_reduced_second, x_second, w.ffn_norm)
    # %gate_up_second = linear %ffn_input_second, %w_gate_up : bf16[T/2, 192@tp]
    gate_up_second = F.linear(ffn_input_second, w.w_gate_up)
    # %active_second = swiglu %gate_up_second : bf16[T/2, 96@tp]
    active_second = swiglu(gate_up_second)
    # %down_second = linear %active_second, %w_down : bf16[T/2, 64]+sum(tp)
    down_second = F.linear(active_second, w.w_down)
    # %down_reduced_second = all_reduce %down_second {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(down_second, group=comm.tp)
    down_reduced_second = down_second
    # %y_second = add %x_attention_second, %down_reduced_second : bf16[T/2, 64]
    y_second = x_attention_second.add_(down_reduced_second)
    # %y = join %y_first, %y_second : bf16[T, 64]
    y = torch.cat((y_first, y_second))
    # %next_normed = rms_norm %y, %attention_norm {eps=1e-06} : bf16[T, 64]
    next_normed = rms_norm(y, next_w.attention_norm)
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
    o = F.linear(attention, w.w_o)
    # %o_reduced = all_reduce %o {axis="tp"} : bf16[T, 64]
    dist.all_reduce(o, group=comm.tp)
    o_reduced = o
    # %ffn_input, %x_attention = add_rms_norm %o_reduced, %x, %ffn_norm {eps=1e-06}
    #   : bf16[T, 64]; bf16[T, 64]
    ffn_input, x_attention = add_rms_norm(o_reduced, x, w.ffn_norm)
    # %gate_up = linear %ffn_input, %w_gate_up : bf16[T, 192@tp]
    gate_up = F.linear(ffn_input, w.w_gate_up)
    # %active = swiglu %gate_up : bf16[T, 96@tp]
    active = swiglu(gate_up)
    # %down = linear %active, %w_down : bf16[T, 64]+sum(tp)
    down = F.linear(active, w.w_down)
    # %down_reduced = all_reduce %down {axis="tp"} : bf16[T, 64]
    dist.all_reduce(down, group=comm.tp)
    down_reduced = down
    # %y = add %x_attention, %down_reduced : bf16[T, 64]
    y = x_attention.add_(down_reduced)
    return y


def layer_halves_last(w, k_cache, v_cache, batch, decode, prefill, swaps, second_prefill, second_swaps, comm, x, normed, rot):
    # %qkv = linear %normed, %w_qkv : bf16[T, 128@tp]
    qkv = F.linear(normed, w.w_qkv)
    # %q_rotated, %kv_new = rope_append %qkv, %rot, %kv, %q_norm, %k_norm {eps=1e-06, heads=4}
    #   : bf16[T, 4@tp, 16]; bf16[KV@kvp, 2, 2@tp, 16]
    q_rotated = rope_append(qkv, rot, k_cache, v_cache, batch.slots, w.q_norm, w.k_norm)
    # %q_rotated_first, %q_rotated_second = halve %q_rotated
    #   : bf16[T/2, 4@tp, 16]; bf16[T/2, 4@tp, 16]
    q_rotated_first, q_rotated_second = q_rotated.split(batch.halves)
    # %x_first, %x_second = halve %x : bf16[T/2, 64]; bf16[T/2, 64]
    x_first, x_second = x.split(batch.halves)
    # %out_first, %lse_first = attend %q_rotated_first, %kv_new {half=0}
    #   : bf16[T/2, 4@tp, 16]+lse(kvp); f32[T/2, 4@tp]+lse(kvp)
    out_first, n = torch.empty_like(q_rotated_first), batch.num_decode
    lse_first = torch.empty(q_rotated_first.shape[:2], dtype=torch.float32, device=q_rotated_first.device)
    if batch.decode is not None:
        attention_decode.attention_decode(q_rotated_first[:n], k_cache, v_cache, decode, out_first[:n], lse_first[:n])
    if batch.prefill is not None:
        attention_prefill.attention_prefill(q_rotated_first[n:], k_cache, v_cache, prefill, out_first[n:], lse_first[n:])
    # %out_first_sent, %lse_first_sent = exchange %out_first, %lse_first {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]+sent(kvp); f32[T/2, 4@tp]+sent(kvp)
    out_first_sent = collectives.exchange_over_kvp(out_first, lse_first, swaps, comm.kvp)
    # %out_second, %lse_second = attend %q_rotated_second, %kv_new {half=1}
    #   : bf16[T/2, 4@tp, 16]+lse(kvp); f32[T/2, 4@tp]+lse(kvp)
    out_second = torch.empty_like(q_rotated_second)
    lse_second = torch.empty(q_rotated_second.shape[:2], dtype=torch.float32, device=q_rotated_second.device)
    attention_prefill.attention_prefill(q_rotated_second, k_cache, v_cache, second_prefill, out_second, lse_second)
    # %out_second_sent, %lse_second_sent = exchange %out_second, %lse_second {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]+sent(kvp); f32[T/2, 4@tp]+sent(kvp)
    out_second_sent = collectives.exchange_over_kvp(out_second, lse_second, second_swaps, comm.kvp)
    # %out_merged_first, %lse_merged_first = merge %out_first_sent, %lse_first_sent {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]; f32[T/2, 4@tp]
    out_merged_first, _ = collectives.merge_sent(out_first_sent)
    # %attention_first = merge_heads %out_merged_first : bf16[T/2, 64@tp]
    attention_first = out_merged_first.flatten(1)
    # %o_first = linear %attention_first, %w_o : bf16[T/2, 64]+sum(tp)
    o_first = F.linear(attention_first, w.w_o)
    # %o_reduced_first = all_reduce %o_first {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(o_first, group=comm.tp)
    o_reduced_first = o_first
    # %ffn_input_first, %x_attention_first = add_rms_norm %o_reduced_first, %x_first, %ffn_norm {eps=1e-06}
    #   : bf16[T/2, 64]; bf16[T/2, 64]
    ffn_input_first, x_attention_first = add_rms_norm(o_reduced_first, x_first, w.ffn_norm)
    # %gate_up_first = linear %ffn_input_first, %w_gate_up : bf16[T/2, 192@tp]
    gate_up_first = F.linear(ffn_input_first, w.w_gate_up)
    # %active_first = swiglu %gate_up_first : bf16[T/2, 96@tp]
    active_first = swiglu(gate_up_first)
    # %down_first = linear %active_first, %w_down : bf16[T/2, 64]+sum(tp)
    down_first = F.linear(active_first, w.w_down)
    # %down_reduced_first = all_reduce %down_first {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(down_first, group=comm.tp)
    down_reduced_first = down_first
    # %y_first = add %x_attention_first, %down_reduced_first : bf16[T/2, 64]
    y_first = x_attention_first.add_(down_reduced_first)
    # %out_merged_second, %lse_merged_second = merge %out_second_sent, %lse_second_sent {axis="kvp"}
    #   : bf16[T/2, 4@tp, 16]; f32[T/2, 4@tp]
    out_merged_second, _ = collectives.merge_sent(out_second_sent)
    # %attention_second = merge_heads %out_merged_second : bf16[T/2, 64@tp]
    attention_second = out_merged_second.flatten(1)
    # %o_second = linear %attention_second, %w_o : bf16[T/2, 64]+sum(tp)
    o_second = F.linear(attention_second, w.w_o)
    # %o_reduced_second = all_reduce %o_second {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(o_second, group=comm.tp)
    o_reduced_second = o_second
    # %ffn_input_second, %x_attention_second = add_rms_norm %o_reduced_second, %x_second, %ffn_norm {eps=1e-06}
    #   : bf16[T/2, 64]; bf16[T/2, 64]
    ffn_input_second, x_attention_second = add_rms_norm(o_reduced_second, x_second, w.ffn_norm)
    # %gate_up_second = linear %ffn_input_second, %w_gate_up : bf16[T/2, 192@tp]
    gate_up_second = F.linear(ffn_input_second, w.w_gate_up)
    # %active_second = swiglu %gate_up_second : bf16[T/2, 96@tp]
    active_second = swiglu(gate_up_second)
    # %down_second = linear %active_second, %w_down : bf16[T/2, 64]+sum(tp)
    down_second = F.linear(active_second, w.w_down)
    # %down_reduced_second = all_reduce %down_second {axis="tp"} : bf16[T/2, 64]
    dist.all_reduce(down_second, group=comm.tp)
    down_reduced_second = down_second
    # %y_second = add %x_attention_second, %down_reduced_second : bf16[T/2, 64]
    y_second = x_attention_second.add_(down_reduced_second)
    # %y = join %y_first, %y_second : bf16[T, 64]
    y = torch.cat((y_first, y_second))
    return y


def step(w, kv, batch, comm):
    """One micro-batch through this stage. Returns the logits [R, vocabulary], or None where no row wants them.

    w: weights (w.NAME, w.layers[i].NAME); kv: (k_cache, v_cache) of each layer; batch: what to compute;
    comm: process groups and neighbours.
    """
    decode = batch.decode and attention_decode.prepare(batch.decode)
    prefill = batch.prefill and attention_prefill.prepare(batch.prefill)
    swaps = collectives.prepare(batch.exchange, batch.halves[0], comm.kvp)
    if batch.second is not None:
        second_prefill = attention_prefill.prepare_beside(batch.second.prefill)
        exchange, rows = batch.second.exchange, batch.halves[1]
        second_swaps = collectives.prepare(exchange, rows, comm.kvp)
    # %x0 = @embed(%ids)
    x0 = embed(w, comm, batch.ids)
    # %rot = @rotation(%pos)
    rot = rotation(batch.pos)
    # %x0_normed = @layer_entry[0:1](%x0)
    x0_normed = layer_entry(w.layers[0], x0)
    # %x1_before, %x1_before_normed = @layer[0:2](%x0, %x0_normed, %rot) or @layer_halves
    x1_before, x1_before_normed = x0, x0_normed
    del x0, x0_normed
    for layer_w, next_w, (k_cache, v_cache) in zip(w.layers[:2], w.layers[1:], kv[:2], strict=True):
        if batch.second is None:
            x1_before, x1_before_normed = layer(
                layer_w, next_w, k_cache, v_cache, batch, decode, prefill, swaps, comm, x1_before, x1_before_normed, rot
            )
        else:
            x1_before, x1_before_normed = layer_halves(
                layer_w, next_w, k_cache, v_cache, batch, decode, prefill, swaps, second_prefill, second_swaps, comm, x1_before, x1_before_normed, rot
            )
    # %x1 = @layer_last[2:3](%x1_before, %x1_before_normed, %rot) or @layer_halves_last
    if batch.second is None:
        x1 = layer_last(
            w.layers[2], *kv[2], batch, decode, prefill, swaps, comm, x1_before, x1_before_normed, rot
        )
    else:
        x1 = layer_halves_last(
            w.layers[2], *kv[2], batch, decode, prefill, swaps, second_prefill, second_swaps, comm, x1_before, x1_before_normed, rot
        )
    del x1_before, x1_before_normed, rot
    # %logits = @head(%x1, %last)
    if batch.last.shape[0] == 0:
        return None  # no row wants logits
    logits = head(w, comm, x1, batch.last)
    return logits
