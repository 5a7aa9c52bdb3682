"""From logits to tokens, all requests of a micro-batch at once, on the device that has the logits.

    logits → logprobs, if asked for            of the model itself, before all that follows
           → bias; ids that may not come yet   (min_tokens)
           → penalties: repetition, then frequency and presence
           → temperature
           → cuts: min_p, then top_k, then top_p of what these leave; equals of the last one stay
           → a token

Order and meaning are vLLM's. Each cut is a threshold, so what is left of a row, and what is drawn from it
in the order of ids, are the same whatever else is in the batch. The random number of a token is a function
of seed and position alone: of no batch, no preemption, and no KVP group that happens to own the newest
token. Masses are summed in float64: the order of additions must not tip them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..request import MOST_LOGPROBS, Sampling, Top
from .history import History
from .transfer import to_device, to_host

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_OFF = float("-inf")
_COLDEST = 1e-5  # already greedy; a colder one could make infinities

ROWS_AT_ONCE = 32
"""Of logits that are shaped and drawn from: each takes some 30 bytes a token of the vocabulary meanwhile."""


@dataclass(frozen=True)
class Draw:
    """A token to be chosen. row: of the logits, those of the sequence's last token."""

    row: int
    sampling: Sampling
    history: History


@dataclass(frozen=True)
class Chosen:
    """Tokens of the draws, in their order, and what was asked for beside.

    tokens: int64 [S]; scores, ids: logprobs and their tokens, [S, 1 + MOST_LOGPROBS], the chosen one first
    """

    tokens: torch.Tensor
    scores: torch.Tensor | None = None
    ids: torch.Tensor | None = None

    def to_host(self) -> Chosen:
        """On its way from a GPU."""
        scores = None if self.scores is None else to_host(self.scores)
        ids = None if self.ids is None else to_host(self.ids)
        return Chosen(to_host(self.tokens), scores, ids)

    def logprobs(self, draw: int, count: int) -> tuple[float, Top]:
        """Once on the host: of a draw's token, and of the `count` likeliest ones."""
        assert self.scores is not None, "whoever asks for logprobs has them made"
        assert self.ids is not None
        own, *scores = self.scores[draw, : count + 1].tolist()
        return own, tuple(zip(self.ids[draw, 1 : count + 1].tolist(), scores, strict=True))


def choose(logits_RV: torch.Tensor, draws: Sequence[Draw], eos: Iterable[int]) -> Chosen:
    """A token for each draw. eos: the model's own end-of-sequence tokens."""
    device, rows = logits_RV.device, [draw.row for draw in draws]
    whole = rows == list(range(logits_RV.shape[0]))
    logits_SV = logits_RV if whole else logits_RV[_ints(rows, device)]
    tokens = logits_SV.argmax(1)
    shaped = [i for i, draw in enumerate(draws) if not _is_plain(draw)]
    for first in range(0, len(shaped), ROWS_AT_ONCE):
        some = shaped[first : first + ROWS_AT_ONCE]
        places = _ints(some, device)
        tokens[places] = sample(logits_SV[places].float(), [draws[i] for i in some], eos)
    scored = [i for i, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    return Chosen(tokens, *_scores(logits_SV, tokens, scored)) if scored else Chosen(tokens)


def sample(logits_SV: torch.Tensor, draws: Sequence[Draw], eos: Iterable[int]) -> torch.Tensor:
    """Tokens [S] of rows that are float32 and may be written to."""
    shape(logits_SV, draws, eos)
    hot = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if not hot:
        return logits_SV.argmax(1)
    device = logits_SV.device
    samplings, places = [draws[i].sampling for i in hot], _ints(hot, device)
    rows = logits_SV[places] / _floats([max(s.temperature, _COLDEST) for s in samplings], device)
    cut(rows, samplings)
    mass = torch.softmax(rows, 1, dtype=torch.float64).cumsum(1)
    points = [uniform(draws[i].sampling.seed or 0, draws[i].history.length) for i in hot]
    point = _floats(points, device, torch.float64) * mass[:, -1:]
    tokens = logits_SV.argmax(1)
    drawn = torch.searchsorted(mass, point, right=True).flatten()
    tokens[places] = drawn.clamp_(max=logits_SV.shape[1] - 1)  # logits may be no numbers
    return tokens


def shape(logits_SV: torch.Tensor, draws: Sequence[Draw], eos: Iterable[int]) -> None:
    """All that comes before the temperature, in place."""
    _bias(logits_SV, draws, eos)
    _penalise_repetition(logits_SV, draws)
    _penalise_counts(logits_SV, draws)


def cut(logits_SV: torch.Tensor, samplings: Sequence[Sampling]) -> None:
    """Logits below their row's threshold become −inf, in place."""
    device, vocab = logits_SV.device, logits_SV.shape[1]
    if any(s.min_p for s in samplings):
        logs = [math.log(s.min_p) if s.min_p else _OFF for s in samplings]
        _drop_below(logits_SV, logits_SV.amax(1, keepdim=True) + _floats(logs, device))
    cutting = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1]
    if not cutting:
        return
    places, counts = _ints(cutting, device), [samplings[i].top_k or vocab for i in cutting]
    values = logits_SV[places].topk(min(max(counts), vocab), 1).values
    ranks = torch.arange(values.shape[1], device=device)
    values.masked_fill_(ranks >= _ints(counts, device)[:, None], _OFF)
    weights = torch.softmax(values, 1, dtype=torch.float64)
    before = weights.cumsum(1) - weights
    top_p = _floats([samplings[i].top_p for i in cutting], device, torch.float64)
    kept = ((before < top_p) & (values > _OFF)).sum(1, keepdim=True)
    thresholds = values.new_full((logits_SV.shape[0], 1), _OFF)
    thresholds[places] = values.gather(1, kept.clamp_(min=1) - 1)
    _drop_below(logits_SV, thresholds)


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1), for the token at `position`. (splitmix64, Steele et al., 2014.)"""
    z = (seed + position * _GOLDEN) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return ((z ^ z >> 31) >> 11) / 2**53


def _is_plain(draw: Draw) -> bool:
    """Whether the token is the likeliest one as the logits stand."""
    s = draw.sampling
    return (
        s.temperature == 0
        and not s.logit_bias
        and draw.history.generated >= s.min_tokens
        and (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) == (1, 0, 0)
    )


def _bias(logits: torch.Tensor, draws: Sequence[Draw], eos: Iterable[int]) -> None:
    found: list[tuple[int, int, float]] = []
    for i, draw in enumerate(draws):
        sampling = draw.sampling
        found += ((i, id, bias) for id, bias in sampling.logit_bias)
        if draw.history.generated < sampling.min_tokens:
            ends = sampling.stop_ids.union(() if sampling.ignore_eos else eos)
            found += ((i, id, _OFF) for id in ends)
    _add(logits, found)


def _penalise_counts(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    _add(
        logits,
        [
            (i, id, -(count * draw.sampling.frequency_penalty + draw.sampling.presence_penalty))
            for i, draw in enumerate(draws)
            if draw.sampling.frequency_penalty or draw.sampling.presence_penalty
            for id, count in draw.history.counts.items()
        ],
    )


def _penalise_repetition(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Ids of prompt and answer: a logit above 0 is divided by the penalty, others are multiplied by it."""
    rows, ids, factors = [], [], []
    for i, draw in enumerate(draws):
        before, answer = draw.history.prompt_ids, list(draw.history.counts)
        if before is not None:
            ids += [before, _ints(answer, logits.device)]
            count = len(before) + len(answer)
            rows.append(before.new_full((count,), i))
            factors.append(logits.new_full((count,), draw.sampling.repetition_penalty))
    if rows:
        row, id, factor = torch.cat(rows), torch.cat(ids), torch.cat(factors)
        old = logits[row, id]
        logits[row, id] = torch.where(old > 0, old / factor, old * factor)


def _drop_below(logits: torch.Tensor, thresholds: torch.Tensor) -> None:
    """thresholds: [S, 1]"""
    logits.masked_fill_(logits < thresholds, _OFF)


def _scores(
    logits_SV: torch.Tensor, tokens: torch.Tensor, scored: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in `Chosen`, of the rows `scored`; others are 0."""
    width = 1 + min(MOST_LOGPROBS, logits_SV.shape[1])
    scores = logits_SV.new_zeros((len(tokens), width), dtype=torch.float32)
    ids = tokens.new_zeros((len(tokens), width))
    for first in range(0, len(scored), ROWS_AT_ONCE):
        places = _ints(scored[first : first + ROWS_AT_ONCE], logits_SV.device)
        logprobs = torch.log_softmax(logits_SV[places], 1, dtype=torch.float32)
        best = logprobs.topk(width - 1, 1)
        own = tokens[places, None]
        scores[places] = torch.cat([logprobs.gather(1, own), best.values], 1)
        ids[places] = torch.cat([own, best.indices], 1)
    return scores, ids


def _add(logits: torch.Tensor, found: Sequence[tuple[int, int, float]]) -> None:
    """What is to be added: (row, id, value)."""
    if found:
        rows, ids, values = zip(*found, strict=True)
        device = logits.device
        at = _ints(rows, device), _ints(ids, device)
        logits.index_put_(at, _floats(values, device).flatten(), accumulate=True)


def _ints(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=torch.int64), device)


def _floats(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A column [S, 1]."""
    return to_device(torch.tensor(values, dtype=dtype)[:, None], device)
