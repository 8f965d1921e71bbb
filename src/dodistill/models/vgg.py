"""VGG with BatchNorm for small images, in five blocks: vgg8, vgg11, vgg13.

State-dict keys follow the distillation literature: `block{0..4}.{i}` (convolution with bias at 0, 3; BatchNorm at 1, 4)
and `classifier`. Max-pool after blocks 0, 1, 2, and after block 3 only for images of 64 pixels or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def _block(i: int, widths: Sequence[int]) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU for each width, without the last ReLU, which is the network's `relu`."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(i, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        i = width
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes]; `widths` holds the convolutions of each of the five blocks."""

    def __init__(self, widths: Sequence[Sequence[int]], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        i = in_channels
        for k, block in enumerate(widths):
            self.add_module(f"block{k}", _block(i, block))
            i = block[-1]
        self.relu = nn.ReLU()  # a module, so that hooks see its outputs, which are the stages' maps
        self.classifier = nn.Linear(i, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (9 * m.out_channels)))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        pools = 4 if x.shape[-1] >= 64 else 3
        for k in range(5):
            x = self.relu(self.get_submodule(f"block{k}")(x))
            if k < pools:
                x = F.max_pool2d(x, 2)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


ZOO: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg8": partial(VGG, ((64,), (128,), (256,), (512,), (512,))),
    "vgg11": partial(VGG, ((64,), (128,), (256, 256), (512, 512), (512, 512))),
    "vgg13": partial(VGG, ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))),
}
