"""Residual networks for small images (He et al. 2016).

Two families, both with a 3x3 stem and no max-pool, both with the classifier under the key `linear`:

* resnet18, resnet34, resnet50: four stages of width 64..512, projection shortcuts
  (`conv1, bn1, layer{1..4}.{i}.{conv*,bn*,shortcut.0,shortcut.1}, linear`);
* resnet8, 14, 20, 32, 56, 110: three stages of width 16..64, parameter-free "option A" shortcuts that
  subsample and pad channels with zeros (`conv1, bn1, layer{1..3}.{i}.{conv1,bn1,conv2,bn2}, linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(i: int, o: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, size, stride, size // 2, bias=False)


class _Projection(nn.Module):
    """The shortcut of the wide family's units: the identity, or a strided 1x1 convolution and a BatchNorm."""

    expansion = 1

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and i == o
        self.shortcut = nn.Sequential() if same else nn.Sequential(_conv(i, o, 1, stride), nn.BatchNorm2d(o))


class Basic(_Projection):
    """Two 3x3 convolutions."""

    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__(i, width, stride)
        self.conv1, self.bn1 = _conv(i, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Bottleneck(_Projection):
    """1x1, 3x3, 1x1; four times as wide at its end."""

    expansion = 4

    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__(i, 4 * width, stride)
        self.conv1, self.bn1 = _conv(i, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class OptionA(nn.Module):
    """Two 3x3 convolutions; where the width grows the shortcut subsamples and pads channels with zeros."""

    expansion = 1

    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(i, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - i) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes]. Stage k has `depths[k]` units of width `stem * 2**k`."""

    def __init__(
        self,
        unit: type[Basic] | type[Bottleneck] | type[OptionA],
        depths: Sequence[int],
        stem: int,
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, stem, 3), nn.BatchNorm2d(stem)
        self.stages = len(depths)
        i = stem
        for k, depth in enumerate(depths):
            width, units = stem * 2**k, []
            for j in range(depth):
                units.append(unit(i, width, 2 if k > 0 and j == 0 else 1))
                i = width * unit.expansion
            self.add_module(f"layer{k + 1}", nn.Sequential(*units))
        self.linear = nn.Linear(i, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for k in range(self.stages):
            x = self.get_submodule(f"layer{k + 1}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


ZOO: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": partial(ResNet, Basic, (2, 2, 2, 2), 64),
    "resnet34": partial(ResNet, Basic, (3, 4, 6, 3), 64),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), 64),
    "resnet8": partial(ResNet, OptionA, (1, 1, 1), 16),
    "resnet14": partial(ResNet, OptionA, (2, 2, 2), 16),
    "resnet20": partial(ResNet, OptionA, (3, 3, 3), 16),
    "resnet32": partial(ResNet, OptionA, (5, 5, 5), 16),
    "resnet56": partial(ResNet, OptionA, (9, 9, 9), 16),
    "resnet110": partial(ResNet, OptionA, (18, 18, 18), 16),
}
