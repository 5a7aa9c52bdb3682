"""From logits to tokens, with a temperature, top_k and top_p. (Greedy tokens come from the device.)

The random number of a token is a function of (seed, position) alone: it does not depend on what
else is in the batch, nor on which KVP group happens to own the newest token.
"""

from __future__ import annotations

import torch

from .request import Sampling

_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads neighbouring positions over the seeds


def sample(logits_V: torch.Tensor, sampling: Sampling, position: int) -> int:
    """A token id from one row of float32 logits [vocab], for the token at `position`.

    sampling: with a temperature above 0
    """
    values, ids = torch.sort(logits_V / sampling.temperature, descending=True, stable=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    weights = torch.softmax(values, dim=-1)
    mass = weights.cumsum(-1)
    kept = int((mass - weights < sampling.top_p).sum())
    generator = torch.Generator()
    generator.manual_seed(((sampling.seed or 0) + position * _MIX) % 2**63)
    point = torch.rand((), generator=generator, dtype=torch.float64).item() * mass[kept - 1].item()
    index = int(torch.searchsorted(mass[:kept], mass.new_tensor(point), right=True))
    return int(ids[min(index, kept - 1)])
