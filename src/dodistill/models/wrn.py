"""Wide residual networks for small images (Zagoruyko & Komodakis 2016): wrn16_1, wrn16_2, wrn40_1, _2, _4.

State-dict keys follow the data-free-distillation literature, so that its checkpoints load:
`conv1, block{1..3}.layer.{i}.{bn1,conv1,bn2,conv2,convShortcut}, bn1, fc`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class Unit(nn.Module):
    """Pre-activation unit. Where the width changes, the activated input feeds both branches."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(a)
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return skip + y


class Stage(nn.Module):
    """`depth` units; the first one strides."""

    def __init__(self, width_in: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(Unit(width_in if i == 0 else width, width, stride if i == 0 else 1) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class WideResNet(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes]; `depth` = 6 n + 4, widths 16k, 32k, 64k."""

    stage_names = ("block1", "block2", "block3")  #: see `taps.stages`

    def __init__(self, depth: int, k: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(16, 16 * k, n, 1)
        self.block2 = Stage(16 * k, 32 * k, n, 2)
        self.block3 = Stage(32 * k, 64 * k, n, 2)
        self.bn1 = nn.BatchNorm2d(64 * k)
        self.fc = nn.Linear(64 * k, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu(self.bn1(x)).mean((2, 3)))
        return logits


ZOO: dict[str, Callable[[int, int], nn.Module]] = {
    f"wrn{depth}_{k}": partial(WideResNet, depth, k) for depth, k in [(16, 1), (16, 2), (40, 1), (40, 2), (40, 4)]
}
