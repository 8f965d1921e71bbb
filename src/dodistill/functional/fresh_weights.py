"""Fresh weights of networks: from a seed, or from the distributions that papers' code draws them from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeding(seed: int | None) -> Iterator[None]:
    """Seed torch's global CPU generator, from which modules initialise, for the block; then restore its state.

    `None`: leave the generator alone.
    """
    if seed is None:
        yield
        return
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@torch.no_grad()
def uniform_weights(net: nn.Module, bound: float, generator: torch.Generator) -> None:
    """Redraw the weights of convolutions and Linear layers from U(-bound, bound), with biases 0; in place."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.uniform_(-bound, bound, generator=generator)
            if m.bias is not None:
                m.bias.zero_()


@torch.no_grad()
def normal_weights(net: nn.Module, generator: torch.Generator, deviation: float = 0.02) -> None:
    """Redraw the weights of convolutions and Linear layers from N(0, deviation^2) and those of BatchNorm from
    N(1, deviation^2), with biases 0; in place."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            centre = float(isinstance(m, nn.BatchNorm2d))
            noise = torch.randn(m.weight.shape, generator=generator, device=m.weight.device)
            m.weight.copy_(centre + deviation * noise)
            if m.bias is not None:
                m.bias.zero_()
