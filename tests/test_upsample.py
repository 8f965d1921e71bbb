"""The transposed convolution against the upsampling and convolution that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dodistill.models.upsample import UpsampleConv, transposed_kernel


def slow(x: Tensor, w: Tensor) -> Tensor:
    """Every output pixel on its own, from the definition."""
    b, _, height, width = x.shape
    out = torch.zeros(b, len(w), 2 * height, 2 * width, dtype=x.dtype)
    for i in range(2 * height):
        for j in range(2 * width):
            for u in range(3):
                for v in range(3):
                    y, z = i + u - 1, j + v - 1
                    if 0 <= y < 2 * height and 0 <= z < 2 * width:
                        out[:, :, i, j] += x[:, :, y // 2, z // 2] @ w[:, :, u, v].T
    return out


@pytest.mark.parametrize("bias", [False, True])
def test_equals_upsample_then_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    ours = UpsampleConv(3, 5, bias=bias).double()
    theirs = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, 1, 1, bias=bias)).double()
    theirs[1].load_state_dict(ours.state_dict())  # the same names and shapes
    x = torch.randn(2, 3, 4, 3, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x))
    expected = slow(x, ours.weight.detach())
    torch.testing.assert_close(ours(x) - (0 if ours.bias is None else ours.bias.view(1, -1, 1, 1)), expected)


def test_its_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    ours = UpsampleConv(2, 3).double()
    theirs = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 3, 3, 1, 1)).double()
    theirs[1].load_state_dict(ours.state_dict())
    g = torch.randn(2, 3, 6, 8, dtype=torch.double)
    results = []
    for net, conv in ((ours, ours), (theirs, theirs[1])):
        x = torch.linspace(-1, 1, 2 * 2 * 3 * 4, dtype=torch.double).view(2, 2, 3, 4).requires_grad_()
        net(x).backward(g)
        results.append((x.grad, conv.weight.grad, conv.bias.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_kernel_holds_every_weight_four_times() -> None:
    w = torch.randn(4, 3, 3, 3)
    kernel = transposed_kernel(w)
    assert kernel.shape == (3, 4, 4, 4)
    torch.testing.assert_close(kernel.sum((2, 3)), 4 * w.sum((2, 3)).T)
