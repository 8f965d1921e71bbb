"""Second derivatives of convolution and BatchNorm: the same functions, the same derivatives, cheaper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dodistill import load_model
from dodistill.functional.curvature import second_derivatives
from helpers import same

CONVOLUTIONS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((4, 2, 3, 3), {"padding": 1}),
    ((4, 2, 3, 3), {"padding": (1, 0), "stride": (2, 1)}),
    ((4, 2, 1, 1), {"stride": 2}),
    ((4, 1, 3, 3), {"padding": 2, "dilation": 2, "groups": 2}),
    ((2, 1, 2, 3), {"groups": 2}),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("shape", "settings"), CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(shape: tuple[int, ...], settings: dict[str, Any], bias: bool) -> None:
    x, w, b = numbers(2, 2, 5, 4), numbers(*shape), numbers(shape[0]) if bias else None
    tensors = [x, w] + ([b] if b is not None else [])

    def run(*t: Tensor) -> Tensor:
        with second_derivatives():
            return F.conv2d(*t, **settings)  # type: ignore[no-any-return]

    assert torch.equal(run(*tensors), F.conv2d(*tensors, **settings))
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("channels_last", [True, False])
def test_batchnorm(channels_last: bool) -> None:
    x, w, b = numbers(3, 2, 4, 5), numbers(2), numbers(2, seed=1)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with second_derivatives():
            return F.batch_norm(x, torch.zeros(2).double(), torch.ones(2).double(), w, b, True, 0.1, 0.05)

    assert torch.autograd.gradcheck(run, [x, w, b])
    assert torch.autograd.gradgradcheck(run, [x, w, b])


def hessian_product(net: nn.Module, x: Tensor, t: Tensor, v: list[Tensor], own: bool) -> tuple[list[Tensor], Any]:
    """(gradient, Hessian times v) of an L1 loss, and the buffers that the pass left."""
    net = copy.deepcopy(net)
    if own:
        with second_derivatives():
            s = net(x)
    else:
        s = net(x)
    w = list(net.parameters())
    g = torch.autograd.grad((s - t).abs().mean(), w, create_graph=True)
    Hv = torch.autograd.grad(g, w, v, allow_unused=True)
    return [*(d.detach() for d in g), *(torch.zeros(1) if h is None else h for h in Hv)], dict(net.named_buffers())


def grouped() -> nn.Module:
    """Depthwise and strided convolutions, biases, pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, 1, 1, groups=6),
        nn.BatchNorm2d(6), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 1, bias=False), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["wrn16_1", "grouped"])
def test_whole_networks(spec: str) -> None:
    """The Hessian product is autograd's own."""
    g = torch.Generator().manual_seed(0)
    net: nn.Module = load_model("wrn16_1", num_classes=3, image_size=16, seed=0)
    if spec == "grouped":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = grouped()
    net = net.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(3, 3, 16, 16, generator=g, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    t = torch.randn(3, 3, generator=g, dtype=torch.float64)
    v = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in net.parameters()]
    slow, buffers = hessian_product(net.train(), x, t, v, False)
    fast, own_buffers = hessian_product(net.train(), x, t, v, True)
    same(buffers, own_buffers)
    largest = max(float(a.abs().max()) for a in slow)
    for a, b in zip(slow, fast):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-10 * largest)


def test_what_it_does_not_know_it_leaves_alone() -> None:
    """Eval mode, other shapes, no weight, padding by name, low precision."""
    x, g = torch.rand(2, 3, 6, 6), torch.Generator().manual_seed(0)
    norm, conv = nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3, padding="same")
    flat = nn.BatchNorm1d(3)
    with second_derivatives():
        a = norm(x), conv(x), flat(x[:, :, 0, 0]), F.batch_norm(x, torch.zeros(3), torch.ones(3))
    norm.reset_running_stats()
    flat.reset_running_stats()
    b = norm(x), conv(x), flat(x[:, :, 0, 0]), F.batch_norm(x, torch.zeros(3), torch.ones(3))
    same(list(a), list(b))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    v = [torch.randn(p.shape, generator=g) for p in net.parameters()]
    found = []
    for own in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(hessian_product(net.train(), x, torch.zeros(2, 2, 2, 2), v, own)[0])
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    slow, fast = (torch.cat([t.flatten() for t in tensors]) for tensors in found)
    assert F.cosine_similarity(slow, fast, dim=0) > 0.99
    assert (fast - slow).norm() < 0.1 * slow.norm()
