"""Every layout, against transformers: the logits of every row, and 32 greedy tokens.

All eight layouts with tp, spp, kvp ∈ {1, 2}, four model families, two chunk policies. Four requests
of different lengths run at once, so that micro-batches are ragged and mix decodes with chunks of
several prompts; the longer ones cross from one KVP group into the next in the middle of a chunk, and come
back to their first. With short stripes a chunk crosses several.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mnemoc.artifact import ChunkRule
from mnemoc.runtime import Engine, Request, Sampling
from mnemoc.runtime.executor.workers import NurseryProcess

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYOUTS = tuple(itertools.product((1, 2), repeat=3))
POLICIES = {
    "shrinking": (ChunkRule(0, 64, 48, 1, 1e-3), ChunkRule(64, 4096, 20, 1, 1e-3)),
    "large": (ChunkRule(0, 4096, 130, 1, 1e-3),),
}
LENGTHS = (210, 5, 33, 150)
NEW_TOKENS = 32
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Expected:
    """A prompt, its greedy continuation, and the logits after each of their positions but the last."""

    prompt: tuple[int, ...]
    tokens: list[int]
    logits: npt.NDArray[np.float32]


References = Callable[[str], list[Expected]]


@pytest.fixture(scope="module")
def references(models: Callable[..., Path]) -> References:
    """What transformers says, by family, computed once."""
    made: dict[str, list[Expected]] = {}

    def reference(family: str) -> list[Expected]:
        if family not in made:
            made[family] = _ask_transformers(models(family))
        return made[family]

    return reference


def _ask_transformers(directory: Path) -> list[Expected]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    choose = random.Random(3)
    expected = []
    for length in LENGTHS:
        prompt = tuple(choose.randrange(256) for _ in range(length))
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            new = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
            )[0, length:]
            logits = model(torch.cat([ids, new[None, :-1]], dim=1)).logits[0]
        expected.append(Expected(prompt, new.tolist(), logits.numpy()))
    return expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "spp", "kvp"), LAYOUTS)
def test_a_layout_gives_the_logits_and_the_greedy_tokens_of_transformers(
    tp: int,
    spp: int,
    kvp: int,
    family: str,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    references: References,
) -> None:
    which = (tp + spp + kvp + FAMILIES.index(family)) % 2
    chunks = POLICIES[("shrinking", "large")[which]]
    model = models(family)
    plan = plans(model, tp=tp, spp=spp, kvp=kvp, chunks=chunks)
    expect(plan, model, nursery, references(family))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("tp", "spp"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_layout_with_helix_is_as_exact(
    tp: int,
    spp: int,
    family: str,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    references: References,
) -> None:
    """Requests live on one group and are computed by both; the longer ones come to live on both."""
    model = models(family)
    chunks = POLICIES[("shrinking", "large")[(tp + spp + len(family)) % 2]]
    plan = plans(model, tp=tp, spp=spp, kvp=2, ffn="helix", chunks=chunks)
    expect(plan, model, nursery, references(family))


def test_helix_is_exact_on_groups_that_a_request_never_reaches(
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    references: References,
) -> None:
    """Four groups, of which most requests fill one or two and none fills all; one KV head."""
    model = models("qwen2_mqa")
    plan = plans(model, kvp=4, ffn="helix", stripe_tokens=112)
    expect(plan, model, nursery, references("qwen2_mqa"))


@pytest.mark.parametrize(
    ("tp", "spp", "kvp", "ffn"),
    [(1, 1, 2, "repeated"), (1, 2, 2, "repeated"), (2, 1, 2, "repeated"), (1, 1, 2, "helix")],
)
@pytest.mark.parametrize("stripe_tokens", [16, 48])
def test_chunks_that_cross_many_stripes_are_exact(
    stripe_tokens: int,
    tp: int,
    spp: int,
    kvp: int,
    ffn: str,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    references: References,
) -> None:
    """Chunks of 130 tokens: up to nine stripes, and as many as five segments of one request on a group."""
    family = FAMILIES[(tp + spp + stripe_tokens // 16) % 4]
    model = models(family)
    layout = {"tp": tp, "spp": spp, "kvp": kvp, "ffn": ffn}
    plan = plans(model, **layout, stripe_tokens=stripe_tokens, chunks=POLICIES["large"])
    expect(plan, model, nursery, references(family))


@pytest.mark.parametrize("stripe_tokens", [16, 112])
def test_four_groups_that_all_take_part_are_exact(
    stripe_tokens: int,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    references: References,
) -> None:
    model = models("llama")
    plan = plans(model, kvp=4, stripe_tokens=stripe_tokens)
    expect(plan, model, nursery, references("llama"))


@pytest.mark.parametrize(
    ("tp", "spp", "kvp", "ffn", "stripe_tokens", "overlap_rows"),
    [
        (1, 1, 2, "repeated", 96, 2),
        (2, 1, 2, "repeated", 16, 7),
        (1, 2, 2, "repeated", 48, 20),
        (1, 1, 4, "repeated", 16, 2),
        (2, 1, 2, "helix", 48, 2),
        (1, 1, 4, "helix", 112, 30),
    ],
)
def test_chunks_in_two_halves_are_exact(
    tp: int,
    spp: int,
    kvp: int,
    ffn: str,
    stripe_tokens: int,
    overlap_rows: int,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    references: References,
) -> None:
    """Beside decodes and beside chunks that stay whole; a group may begin in the second half."""
    family = FAMILIES[(tp + spp + kvp + stripe_tokens // 16) % 4]
    model = models(family)
    chunks = POLICIES[("shrinking", "large")[overlap_rows % 2]]
    layout = {"tp": tp, "spp": spp, "kvp": kvp, "ffn": ffn, "chunks": chunks}
    plan = plans(model, **layout, stripe_tokens=stripe_tokens, overlap_rows=overlap_rows)
    expect(plan, model, nursery, references(family))


@pytest.mark.parametrize("kvp", [1, 2])
def test_ranks_that_share_a_kv_head_are_exact_too(
    kvp: int,
    models: Callable[..., Path],
    plans: Callable[..., Path],
    nursery: NurseryProcess,
    references: References,
) -> None:
    model = models("qwen2_mqa")
    expect(plans(model, tp=2, kvp=kvp), model, nursery, references("qwen2_mqa"))


def expect(plan: Path, model: Path, nursery: NurseryProcess, wanted: list[Expected]) -> None:
    """The shortest request first, the others once it decodes; what comes back is what transformers says."""
    sampling = Sampling(ignore_eos=True)
    wanted = sorted(wanted, key=lambda want: len(want.prompt))
    requests = [Request(want.prompt, NEW_TOKENS, sampling, logits="all") for want in wanted]
    with Engine.start(plan, model, nursery=nursery) as engine:
        first = engine.submit(requests[0])
        next(iter(first))
        handles = [first, *(engine.submit(request) for request in requests[1:])]
        results = [handle.result() for handle in handles]
        mixed = [i for i in engine.stats.iterations if i.decodes and i.prefill_tokens]
    for want, got in zip(wanted, results, strict=True):
        assert got.logits.shape == want.logits.shape
        assert float(np.abs(got.logits - want.logits).max()) <= TOLERANCE
        assert got.tokens == want.tokens
    assert mixed, "no micro-batch mixed decodes with prefill chunks"


def test_a_request_gives_the_same_tokens_alone_and_in_company(
    models: Callable[..., Path], plans: Callable[..., Path], nursery: NurseryProcess
) -> None:
    """Sampled ones too: a token's random number depends on seed and position only."""
    model = models("llama")
    plan = plans(model, kvp=2, stripe_tokens=64)
    request = Request(tuple(range(100)), 24, Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=5))
    with Engine.start(plan, model, nursery=nursery) as engine:
        alone = engine.submit(request).result().tokens
        company = [engine.submit(Request(tuple(range(n)), 40)) for n in (1, 17, 90)]
        together = engine.submit(request).result().tokens
        for handle in company:
            handle.cancel()
    assert together == alone
