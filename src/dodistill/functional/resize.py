"""Images of another size and number of channels, as whole sets in uint8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(x: Tensor, shape: tuple[int, int, int], at_once: int = 256) -> Tensor:
    """uint8 [n, C, H, W] at another shape: bilinear with antialiasing, as folders are. Grey is repeated in each
    channel, and colour becomes its luma (ITU-R BT.601) where one channel is asked for.

    Raises ValueError for other numbers of channels.
    """
    c, h, w = shape
    if tuple(x.shape[1:]) == (c, h, w):
        return x
    if (x.shape[1], c) not in ((1, 1), (3, 3), (1, 3), (3, 1)):
        raise ValueError(f"images of {x.shape[1]} channels cannot become images of {c}; give 1 or 3.")
    out = torch.empty((len(x), c, h, w), dtype=torch.uint8)
    for part, into in zip(x.split(at_once), out.split(at_once)):
        found = part.float()
        if x.shape[1] > c:
            found = (found * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        if tuple(x.shape[2:]) != (h, w):
            found = F.interpolate(found, (h, w), mode="bilinear", align_corners=False, antialias=True)
        into.copy_(found.round().clamp(0, 255))
    return out
