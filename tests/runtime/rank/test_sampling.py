"""Which tokens may come, how likely they are, what that depends on: against plain words, and transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mnemoc.errors import BadInput
from mnemoc.runtime.rank.history import History
from mnemoc.runtime.rank.sampling import Draw, choose, cut, sample, shape, uniform
from mnemoc.runtime.request import MOST_LOGPROBS, Request, Sampling

VOCAB, EOS = 40, (39,)
CPU = torch.device("cpu")
IDS = st.integers(0, VOCAB - 1)
SEEDS = st.integers(-(2**63), 2**63 - 1)

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.31, 1.0, 1.9]),
    top_p=st.sampled_from([1.0, 0.873, 0.41]),
    top_k=st.sampled_from([0, 1, 7, 30, 900]),
    seed=SEEDS,
    stop_ids=st.frozensets(IDS, max_size=3),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 8),
    min_p=st.sampled_from([0.0, 0.0617, 0.53]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.37, -0.21]),
    repetition_penalty=st.sampled_from([1.0, 1.37, 0.81]),
    logit_bias=st.lists(st.tuples(IDS, st.floats(-9, 9, width=32)), max_size=4).map(tuple),
    logprobs=st.none() | st.integers(0, MOST_LOGPROBS),
)
texts = st.tuples(st.lists(IDS, min_size=1, max_size=12), st.lists(IDS, max_size=12))
requests = st.lists(st.tuples(samplings, texts), min_size=1, max_size=5)
Asked = list[tuple[Sampling, tuple[list[int], list[int]]]]


def history(prompt: Sequence[int], answer: Sequence[int], sampling: Sampling) -> History:
    return History(torch.tensor(prompt, dtype=torch.int32), answer, sampling, CPU)


def draws_of(asked: Asked) -> list[Draw]:
    return [Draw(i, s, history(*text, s)) for i, (s, text) in enumerate(asked)]


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ meaning


def shaped_in_plain_words(
    logits: list[float], sampling: Sampling, prompt: list[int], answer: list[int]
) -> list[float]:
    shaped = []
    for id, unshaped in enumerate(logits):
        logit = unshaped + sum(bias for other, bias in sampling.logit_bias if other == id)
        ends = id in sampling.stop_ids or (id in EOS and not sampling.ignore_eos)
        if ends and len(answer) < sampling.min_tokens:
            logit = -math.inf
        if id in prompt or id in answer:
            r = sampling.repetition_penalty
            logit = logit / r if logit > 0 else logit * r
        logit -= sampling.frequency_penalty * answer.count(id)
        logit -= sampling.presence_penalty * (id in answer)
        shaped.append(logit)
    return shaped


@given(requests, st.integers(0, 2**32))
def test_penalties_biases_and_early_ends_are_what_they_are_in_plain_words(
    asked: Asked, seed: int
) -> None:
    logits = random_logits(len(asked), seed)
    expected = [
        shaped_in_plain_words(row, sampling, *text)
        for row, (sampling, text) in zip(logits.tolist(), asked, strict=True)
    ]
    shape(logits, draws_of(asked), EOS)
    assert torch.allclose(logits, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def kept_in_plain_words(logits: list[float], sampling: Sampling) -> set[int]:
    weights = {id: math.exp(logit - max(logits)) for id, logit in enumerate(logits)}
    order = sorted(weights, key=lambda id: -weights[id])
    order = [id for id in order if weights[id] >= sampling.min_p * weights[order[0]]]
    order = order[: sampling.top_k or VOCAB]
    total = sum(weights[id] for id in order)
    kept: set[int] = set()
    for id in order:
        if sum(weights[other] for other in kept) < sampling.top_p * total:
            kept.add(id)
    return kept


@given(st.lists(samplings, min_size=1, max_size=5), st.integers(0, 2**32))
def test_cuts_leave_what_they_leave_in_plain_words(some: list[Sampling], seed: int) -> None:
    logits = random_logits(len(some), seed)
    rows = zip(logits.tolist(), some, strict=True)
    expected = [kept_in_plain_words(row, sampling) for row, sampling in rows]
    before = logits.clone()
    cut(logits, some)
    left = logits > -math.inf
    assert [set(row.nonzero().flatten().tolist()) for row in left] == expected
    assert torch.equal(logits[left], before[left])


def test_equals_of_the_last_one_that_a_cut_keeps_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).repeat(2, 1)
    cut(logits, [Sampling(top_k=2), Sampling(top_p=0.6)])
    assert (logits > -math.inf).tolist() == [[True, True, True, False]] * 2


@given(samplings, texts, st.integers(0, 2**32))
def test_transformers_means_the_same(
    sampling: Sampling, text: tuple[list[int], list[int]], seed: int
) -> None:
    from transformers.generation import logits_process as theirs

    prompt, answer = text
    logits, ids = random_logits(1, seed), torch.tensor([prompt + answer])
    warmers: list[Any] = [
        theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        theirs.MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_tokens, list(EOS)),
        theirs.TemperatureLogitsWarper(sampling.temperature or 1.0),
        theirs.MinPLogitsWarper(sampling.min_p),
        theirs.TopKLogitsWarper(sampling.top_k or VOCAB),
        theirs.TopPLogitsWarper(sampling.top_p),
    ]
    expected = logits.clone()
    for warmer in warmers:
        expected = warmer(ids, expected)
    known = Sampling(repetition_penalty=sampling.repetition_penalty, min_tokens=sampling.min_tokens)
    shape(logits, [Draw(0, known, history(prompt, answer, known))], EOS)
    logits /= sampling.temperature or 1.0
    cut(logits, [sampling])
    assert torch.equal(logits > -math.inf, expected > -math.inf)
    assert torch.allclose(logits.softmax(1), expected.softmax(1), atol=1e-6)


# ------------------------------------------------------------------------------- what it depends on


@given(requests, st.integers(0, 2**32))
def test_a_token_does_not_depend_on_its_company(asked: Asked, seed: int) -> None:
    logits, draws = random_logits(len(asked), seed), draws_of(asked)
    together = choose(logits, draws, EOS)
    back = choose(logits.flip(0), [Draw(len(asked) - 1 - d.row, *_rest(d)) for d in draws], EOS)
    assert torch.equal(together.tokens, back.tokens)
    for i, draw in enumerate(draws):
        alone = choose(logits[i : i + 1], [Draw(0, *_rest(draw))], EOS)
        assert alone.tokens.item() == together.tokens[i].item()
        if draw.sampling.logprobs is not None:
            own, top = alone.logprobs(0, draw.sampling.logprobs)
            own_there, top_there = together.logprobs(i, draw.sampling.logprobs)
            assert math.isclose(own, own_there, abs_tol=1e-5)
            assert [id for id, _ in top] == [id for id, _ in top_there]


def _rest(draw: Draw) -> tuple[Sampling, History]:
    return draw.sampling, draw.history


@given(samplings, texts, texts, st.integers(0, 2**32))
def test_a_history_that_grew_is_the_one_that_comes_back_after_a_preemption(
    sampling: Sampling,
    text: tuple[list[int], list[int]],
    more: tuple[list[int], list[int]],
    seed: int,
) -> None:
    prompt, answer = text
    grown, again = history(prompt, answer, sampling), history(prompt, answer + more[0], sampling)
    for token in more[0]:
        grown.append(token)
    first, second = random_logits(1, seed), random_logits(1, seed)
    assert torch.equal(
        sample(first, [Draw(0, sampling, grown)], EOS),
        sample(second, [Draw(0, sampling, again)], EOS),
    )
    assert torch.equal(first, second)
    assert grown.length == again.length == len(prompt) + len(answer) + len(more[0])


def test_random_numbers_are_spread_evenly_over_seeds_and_positions() -> None:
    for numbers in (
        [uniform(7, position) for position in range(4000)],
        [uniform(seed, 7) for seed in range(-2000, 2000)],
    ):
        tenths = torch.histc(torch.tensor(numbers), 10, 0, 1) / len(numbers)
        assert torch.allclose(tenths, torch.full((10,), 0.1), atol=0.025)
        assert len(set(numbers)) == len(numbers)


def test_samples_follow_the_distribution() -> None:
    count, sampling = 4000, Sampling(temperature=0.7, seed=1)
    logits = torch.tensor([0.5, 3.0, 2.0, 1.0, -1.0]).repeat(count, 1)
    prompts = [history([0] * (1 + i), [], sampling) for i in range(count)]
    drawn = choose(logits, [Draw(i, sampling, one) for i, one in enumerate(prompts)], EOS).tokens
    share = torch.bincount(drawn, minlength=5) / count
    assert torch.allclose(share, (logits[0] / 0.7).softmax(0), atol=0.03)


# ------------------------------------------------------------------------------- what else is given


@given(requests, st.integers(0, 2**32))
def test_logprobs_are_the_models_own(asked: Asked, seed: int) -> None:
    logits, draws = random_logits(len(asked), seed), draws_of(asked)
    expected = logits.log_softmax(1)
    chosen = choose(logits.clone(), draws, EOS)
    for i, draw in enumerate(draws):
        count = draw.sampling.logprobs
        if count is None:
            continue
        own, top = chosen.logprobs(i, count)
        assert math.isclose(own, expected[i, chosen.tokens[i]].item(), abs_tol=1e-5)
        best = expected[i].sort(descending=True)
        assert [id for id, _ in top] == best.indices[:count].tolist()
        assert torch.allclose(torch.tensor([p for _, p in top]), best.values[:count], atol=1e-5)


def test_greedy_tokens_are_the_argmax_of_rows_that_nobody_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mnemoc.runtime.rank.sampling.sample", None)
    plain = Sampling(top_p=0.3, top_k=1, min_p=0.5, seed=3, min_tokens=1)
    logits = random_logits(3, 0)
    chosen = choose(logits, [Draw(row, plain, history([1], [2], plain)) for row in (0, 2)], EOS)
    assert chosen.tokens.tolist() == logits.argmax(1)[[0, 2]].tolist()
    assert chosen.scores is None


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 2.0])
def test_tokens_are_tokens_however_odd_the_logits(temperature: float) -> None:
    sampling = Sampling(temperature, top_p=0.9, seed=0)
    logits = torch.tensor([[0.0] * 5, [1e30] * 5, [math.nan] * 5, [-1e30, 0, 0, 0, 1e30]])
    draws = [Draw(i, sampling, history([1], [], sampling)) for i in range(4)]
    tokens = choose(logits, draws, EOS).tokens.tolist()
    assert all(0 <= token < 5 for token in tokens)
    assert tokens[3] == 4


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.1},
        {"min_p": -0.1},
        {"min_tokens": -1},
        {"seed": 2**63},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": ((1, math.nan),)},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
)
def test_impossible_sampling_is_bad_input(sampling: dict[str, Any]) -> None:
    (name,) = sampling
    with pytest.raises(BadInput, match=name):
        Sampling(**sampling)


@pytest.mark.parametrize(
    ("sampling", "where"),
    [
        (Sampling(stop_ids=frozenset([4, 40])), "stop_token_ids"),
        (Sampling(logit_bias=((-1, 1.0),)), "logit_bias"),
        (Sampling(stop_ids=frozenset(range(40)), min_tokens=1), "min_tokens"),
    ],
)
def test_tokens_that_the_model_has_not_are_bad_input(sampling: Sampling, where: str) -> None:
    with pytest.raises(BadInput, match=where):
        Request((1,), 4, sampling).check_ids(VOCAB)
    with pytest.raises(BadInput, match="prompt"):
        Request((VOCAB,)).check_ids(VOCAB)
    Request((VOCAB - 1,), sampling=Sampling(stop_ids=frozenset([0]))).check_ids(VOCAB)


def test_an_answer_cannot_be_shorter_than_its_least_length() -> None:
    with pytest.raises(BadInput, match=r"at most max_tokens, 4 \(got 5\)"):
        Request((1,), 4, Sampling(min_tokens=5))
