"""Small tensors between host and device, without either of them waiting for the other.

On a GPU both ways go through pinned memory: the host goes on at once, the stream sees to the order.
"""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor, on the device."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """On its way from a GPU; an event recorded now says when it is there."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
