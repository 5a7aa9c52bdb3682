#!/bin/sh
# llama-3-8b for 10,000,000 tokens of context, planned as tp=8 spp=3 kvp=4: what comes closest on
# vLLM 0.31.0.
#
# What vLLM cannot express:
# - Chunk sizes by context: vLLM has one token budget for all iterations; 96 tokens is what still
#     keeps the time between tokens at full length.
# - KVP over 4 groups of 8: they become one tensor-parallel group of 32, so each all-reduce
#     crosses 4 nodes; its cache is sharded over 4 ranks for decode, prefill is not shared out by
#     sequence.
# - KVP growth: the cache is interleaved over all 4 ranks from the first token on.
# - 10,000,256 positions: llama-3-8b was trained for 8,192; the environment lifts the check, RoPE
#     scaling is still needed.
# - The promise: requests are admitted and ordered without asking what they will take.
#
# MODEL is the model's folder or its name on Hugging Face.
# Run it on each of 12 nodes, with RANK from 0, and HEAD the address of the node of rank 0.
set -eu

export VLLM_PP_LAYER_PARTITION=10,11,11
export VLLM_ALLOW_LONG_MAX_MODEL_LEN=1
[ "$RANK" = 0 ] || set -- --headless "$@"
exec vllm serve "$MODEL" \
    --dtype bfloat16 \
    --kv-cache-dtype auto \
    --max-model-len 10000256 \
    --max-num-seqs 1 \
    --max-num-batched-tokens 97 \
    --block-size 64 \
    --kv-cache-memory-bytes 14080540672 \
    --tensor-parallel-size 32 \
    --pipeline-parallel-size 3 \
    --decode-context-parallel-size 4 \
    --nnodes 12 \
    --node-rank "$RANK" \
    --master-addr "$HEAD" \
    "$@"
