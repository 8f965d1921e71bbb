"""A three-layer network for digits: `tiny{W}` has widths W, 2W, 4W. Keys `conv{1..3}, bn{1..3}, fc`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Tiny(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes]; max-pool by 2 after the first two stages.

    The receptive field is 18 pixels (9 for strided convolutions of the same cost, too few to distinguish digits).
    """

    def __init__(self, width: int, num_classes: int, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, 4 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
