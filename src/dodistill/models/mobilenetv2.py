"""MobileNetV2 (Sandler et al. 2018) for small images: the stem and the second stage do not stride.

The state-dict keys and the parameter count are torchvision's (`features.{i}...`, `classifier.1`); only strides differ.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

#: expansion, width, units, stride of the first unit
STAGES = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def _conv(i: int, o: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1, no activation)."""

    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = i * expansion
        expand = [_conv(i, hidden, 1)] if expansion != 1 else []
        project = [nn.Conv2d(hidden, o, 1, bias=False), nn.BatchNorm2d(o)]
        self.conv = nn.Sequential(*expand, _conv(hidden, hidden, 3, stride, groups=hidden), *project)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes]."""

    stage_names = ("features.3", "features.6", "features.13", "features.17")  #: units before a stride, and the last one

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(in_channels, 32, 3)]
        i = 32
        for expansion, width, units, stride in STAGES:
            for j in range(units):
                layers.append(InvertedResidual(i, width, stride if j == 0 else 1, expansion))
                i = width
        self.features = nn.Sequential(*layers, _conv(i, 1280, 1))
        head = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(nn.Identity(), head)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        nn.init.normal_(head.weight, 0, 0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


ZOO: dict[str, Callable[[int, int], nn.Module]] = {"mobilenetv2": MobileNetV2}
