"""Upsampling by 2 and a 3x3 convolution, as one transposed convolution of 16 products per pixel instead of 36.

Repeating every pixel is a transposed convolution with ones [2, 2] and stride 2. With the 3x3 convolution w after it,
it is one transposed convolution with the 4x4 kernel w' = ones [2, 2] * flip(w): the same linear map of the same nine
weights, zero padding included, up to rounding. Upsampling takes most of a small run's time on a CPU core. Whole
generators are 1.6 to 1.9 times as fast in forward and backward passes (benchmarks/upsample.py).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def transposed_kernel(w: Tensor) -> Tensor:
    """Kernel [O, I, 3, 3] of a convolution -> [I, O, 4, 4] of the transposed convolution that also upsamples."""
    w = w.transpose(0, 1).flip(2, 3)
    return F.pad(w, (0, 1, 0, 1)) + F.pad(w, (1, 0, 0, 1)) + F.pad(w, (0, 1, 1, 0)) + F.pad(w, (1, 0, 1, 0))


class UpsampleConv(nn.Conv2d):
    """[B, I, H, W] -> [B, O, 2H, 2W]: `Upsample(scale_factor=2)` (nearest), then `Conv2d(I, O, 3, padding=1)`.

    Weight [O, I, 3, 3] and bias, their names and initialisation are those of that convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, transposed_kernel(self.weight), self.bias, stride=2, padding=1)
