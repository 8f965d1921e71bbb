"""BatchNorm's running statistics, taken anew from a few images without labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.augment import to_float


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, batch: int = 256) -> nn.Module:
    """Set the running statistics of every BatchNorm of `model` to those of `images` (float in [0, 1] or uint8,
    [n, C, H, W]), in place: the mean over batches. No labels, and few images, are needed. Returns it, in eval mode.
    """
    layers = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    momenta = [m.momentum for m in layers]
    first = next(model.parameters(), images)
    model.eval()
    try:
        for m in layers:
            m.reset_running_stats()
            m.momentum = None  # PyTorch's sign for the plain mean
            m.train()
        for part in images.tensor_split(-(-len(images) // batch)):
            here = part.to(first.device)
            model(here if here.is_floating_point() else to_float(here))
    finally:
        for m, momentum in zip(layers, momenta):
            m.momentum = momentum
    return model.eval()
