"""Random choices of images."""

from __future__ import annotations

import torch
from torch import Tensor


def even(classes: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Indices [at most n] into `classes` [N], at even shares: each class in turn gives one, until it has no more.

    Within a class, and for the last turn, the choice is random. The result lies on the generator's device.
    """
    device = generator.device
    order = torch.randperm(len(classes), generator=generator, device=device)
    shuffled = classes.to(device)[order]
    by_class = shuffled.argsort(stable=True)
    counts = torch.bincount(shuffled)
    first = counts.cumsum(0) - counts
    turn = torch.empty_like(by_class)
    turn[by_class] = torch.arange(len(classes), device=device) - first[shuffled[by_class]]
    return order[turn.argsort(stable=True)[:n]]
