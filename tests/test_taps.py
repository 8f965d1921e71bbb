"""Taps against the definition, inside and outside their `with` block."""

import pytest
import torch
from torch import nn

from dodistill.errors import DodistillError
from dodistill.functional.moments import channel_moments
from dodistill.models.taps import batchnorm_inputs, penultimate
from dodistill.models.zoo import build


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_moments_are_those_of_the_batchnorm_inputs() -> None:
    """In training with momentum 1, BatchNorm's own running statistics are the batch's (the variance unbiased)."""
    net = build("wrn16_1", 5, 3)
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    sizes: list[int] = []
    for m in layers:
        m.momentum = 1.0
        m.register_forward_pre_hook(lambda _m, a: sizes.append(a[0].numel() // a[0].shape[1]))
    with batchnorm_inputs(net) as taps:
        net(torch.rand(6, 3, 16, 16))
        assert taps.modules == layers
        assert len(taps) == 13
        seen = [(m.detach(), v.detach()) for m, v in taps]
    # the final bn1 is defined last and runs last, so definition order is running order here
    for layer, n, (mean, var) in zip(layers, sizes, seen):
        assert torch.allclose(mean, layer.running_mean, atol=1e-5)
        assert torch.allclose(var * n / (n - 1), layer.running_var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_moments_are_var_mean_with_its_gradients(layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 2, 4, 5, generator=g, dtype=torch.double) + 7).contiguous(memory_format=layout).requires_grad_()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    for got, want in zip(channel_moments(x), (mean, var)):
        assert torch.allclose(got, want, rtol=1e-12)
    assert torch.autograd.gradcheck(channel_moments, (x,))
    assert torch.autograd.gradgradcheck(channel_moments, (x,))
    low = x.detach().bfloat16().requires_grad_()
    m, v = channel_moments(low)
    assert m.dtype == v.dtype == torch.float32
    (grad,) = torch.autograd.grad(v.sum(), low)
    assert grad.dtype == torch.bfloat16
    assert torch.allclose(
        grad.double(), 2 * (low.double() - low.double().mean((0, 2, 3), keepdim=True)) / 60, atol=2e-3
    )


def test_moments_carry_gradients_to_the_images() -> None:
    net = build("tiny8", 5, 1).eval().requires_grad_(False)
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    with batchnorm_inputs(net) as taps:
        net(x)
        first = net.conv1(x)
        assert torch.allclose(taps[0][0], first.mean((0, 2, 3)))
        assert torch.allclose(taps[0][1], first.var((0, 2, 3), correction=0), atol=1e-6)
        loss = sum(
            ((m - b.running_mean) ** 2).sum() + (v - b.running_var).abs().sum() for (m, v), b in zip(taps, taps.modules)
        )
        (grad,) = torch.autograd.grad(loss, x)
    assert grad.abs().sum() > 0


def test_moments_are_fp32_under_autocast_and_of_the_latest_pass() -> None:
    net = build("tiny8", 5, 1).eval()
    with batchnorm_inputs(net) as taps, torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.zeros(4, 1, 8, 8))
        zero = taps[0][1]
        net(torch.rand(4, 1, 8, 8))
        assert taps[0][1].dtype == torch.float32
    assert zero.sum() == 0
    with pytest.raises(DodistillError, match="has no input yet"):
        taps[0]


@pytest.mark.parametrize("tap", [batchnorm_inputs, penultimate])
def test_hooks_are_gone_even_after_an_exception(tap) -> None:
    net = build("wrn16_1", 5, 3)
    with tap(net):
        assert hooks(net) > 0
    assert hooks(net) == 0
    with pytest.raises(RuntimeError), tap(net):
        net(torch.rand(1, 2, 8, 8))
    assert hooks(net) == 0


@pytest.mark.parametrize(("name", "width"), [("wrn16_2", 128), ("vgg8", 512), ("resnet20", 64)])
def test_penultimate_is_what_the_classifier_reads(name: str, width: int) -> None:
    net = build(name, 5, 3).eval()
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with penultimate(net) as tap:
        with pytest.raises(DodistillError, match="no features yet"):
            _ = tap.value
        logits = net(torch.rand(2, 3, 32, 32))
    assert tap.value.shape == (2, width)
    assert torch.allclose(head(tap.value), logits, atol=1e-6)


def test_penultimate_of_a_convolutional_head() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with penultimate(net) as tap:
        logits = net(torch.rand(2, 3, 8, 8))
    assert torch.allclose(tap.value @ net[1].weight[:, :, 0, 0].T + net[1].bias, logits, atol=1e-6)
    with pytest.raises(DodistillError, match="no Linear"), penultimate(nn.Flatten()):
        pass
