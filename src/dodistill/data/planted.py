"""Plants a context that correlates with the class into images, to measure how much a network relies on it.

After Figure 1 of CID (NeurIPS 2021): in training, dogs stand on grass and cats in a room; in the test they do not. Here
a colour replaces the place. Each class has one colour. An image shows the colour of its class with probability
rho, else that of another class. Grey images have it as background, behind white strokes; coloured images as a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor


def palette(classes: int) -> Tensor:
    """uint8 [K, 3], evenly spaced hues, alternately bright and dark."""
    hue = torch.arange(classes) / classes
    value = torch.where(torch.arange(classes) % 2 == 0, 0.9, 0.55)
    shifted = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6  # of red, green, blue
    level = 1 - 0.85 * torch.minimum(shifted, 4 - shifted).clamp(0, 1)
    return (255 * value[:, None] * level).round().to(torch.uint8)


def contexts(y: Tensor, classes: int, rho: float, generator: torch.Generator) -> Tensor:
    """[n] a context for each class y [n]: its own with probability rho, else another one, uniformly.

    rho = 1 is aligned with the class, 0 in conflict with it, 1 / classes independent of it.
    """
    own = torch.rand(len(y), generator=generator) < rho
    other = (y + 1 + torch.randint(max(classes - 1, 1), (len(y),), generator=generator)) % classes
    return torch.where(own, y, other)


def plant(x: Tensor, context: Tensor, colours: Tensor) -> Tensor:
    """uint8 [n, 1 or 3, H, W], contexts [n] and colours uint8 [K, 3] -> uint8 [n, 3, H, W]."""
    colour = colours[context][:, :, None, None]
    if x.shape[1] == 1:
        ink = x.float() / 255
        return (255 * ink + (1 - ink) * colour).round().to(torch.uint8)
    height, width = x.shape[2:]
    edge = max(1, min(height, width) // 8)
    frame = torch.ones(height, width, dtype=torch.bool)
    frame[edge : height - edge, edge : width - edge] = False
    return torch.where(frame, colour, x)
