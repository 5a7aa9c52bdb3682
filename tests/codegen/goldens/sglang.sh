#!/bin/sh
# llama-3-8b for 10,000,000 tokens of context, planned as tp=8 spp=3 kvp=4: what comes closest on
# SGLang 0.5.23.
#
# What SGLang cannot express:
# - Chunk sizes by context: with a pipeline SGLang begins with 3,328 tokens and shrinks chunks by
#     a fit of its own.
# - KVP over 4 groups of 8, and its growth: --dcp-size serves models with latent attention (MLA)
#     only; 24 of 96 GPUs are used, and each rank holds requests whole.
# - 10,000,256 positions: llama-3-8b was trained for 8,192; the environment lifts the check, RoPE
#     scaling is still needed.
# - The promise: requests are admitted and ordered without asking what they will take.
#
# MODEL is the model's folder or its name on Hugging Face.
# Run it on each of 3 nodes, with RANK from 0, and HEAD the address of the node of rank 0.
set -eu

export SGLANG_PP_LAYER_PARTITION=10,11,11
export SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1
exec python -m sglang.launch_server --model-path "$MODEL" \
    --dtype bfloat16 \
    --kv-cache-dtype auto \
    --context-length 10000256 \
    --max-running-requests 1 \
    --chunked-prefill-size 3328 \
    --enable-dynamic-chunking \
    --page-size 64 \
    --max-total-tokens 10000256 \
    --tp-size 8 \
    --pp-size 3 \
    --nnodes 3 \
    --node-rank "$RANK" \
    --dist-init-addr "$HEAD:20000" \
    "$@"
