"""Activations computed again: the same derivatives, first and second, from less memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dodistill import load_model
from dodistill.functional.curvature import second_derivatives
from dodistill.functional.recompute import recomputed
from helpers import same


def chain(*activations: nn.Module) -> nn.Module:
    """Convolution, BatchNorm and one activation at a time, on 8 channels."""
    layers: list[nn.Module] = []
    for i, act in enumerate(activations):
        layers += [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), act]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "wrn16_1": lambda: load_model("wrn16_1", num_classes=3, image_size=16, seed=0),
    "resnet8": lambda: load_model("resnet8", num_classes=3, image_size=16, seed=0),
    "mobilenetv2": lambda: load_model("mobilenetv2", num_classes=3, image_size=16, seed=0),
    "vgg8": lambda: load_model("vgg8", num_classes=3, image_size=16, seed=0),
    "every activation": lambda: chain(
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5), nn.SiLU(), nn.SiLU(inplace=True),
        nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), nn.GELU(),
    ),
}  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivatives(net: nn.Module, x: Tensor, t: Tensor, again: bool, own: bool) -> tuple[list[Tensor], Any]:
    """(a gradient and a Hessian product with it, the buffers), with or without the two blocks."""
    net = copy.deepcopy(net)
    w = list(net.parameters())
    with second_derivatives() if own else nullcontext(), recomputed() if again else nullcontext():
        g = torch.autograd.grad((net(x) - t).square().mean(), w, create_graph=True)
    Hg = torch.autograd.grad(g, w, [d.detach() for d in g], allow_unused=True)
    return [*(d.detach() for d in g), *(h for h in Hg if h is not None)], dict(net.named_buffers())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", list(NETS))
def test_the_same_first_and_second_derivatives(name: str, own: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[name]().double().train()
    x, t = numbers(4, 3, 16, 16), numbers(4, 3, seed=1)
    kept, buffers = derivatives(net, x, t, False, own)
    made, made_buffers = derivatives(net, x, t, True, own)
    same(buffers, made_buffers)
    assert len(kept) == len(made)
    largest = max(float(a.abs().max()) for a in kept)
    for a, b in zip(kept, made):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11 * largest)


def held(net: nn.Sequential, x: Tensor, block: Any) -> tuple[list[bool], Tensor]:
    """After the forward pass, is what each layer made still in memory?  And the output."""
    made: list[weakref.ref[Any]] = []
    with block:
        for layer in net:
            x = layer(x)
            made.append(weakref.ref(x.untyped_storage()))
    return [m() is not None for m in made], x


def test_what_can_be_made_again_is_not_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                        nn.SiLU(), nn.Conv2d(4, 2, 3)).train()  # fmt: skip
    x = torch.rand(2, 3, 9, 9)
    assert held(net, x, nullcontext())[0] == [True, False, True, True, True, True, True]
    there, out = held(net, x, recomputed())
    assert there == [True, False, False, True, False, False, True]  # the inputs of BatchNorm, and the output
    out.sum().backward()  # and the pass is none the worse for it


class Counting(recomputed):
    """Beside its work, a list of all that autograd keeps; blind, it is autograd's own choice."""

    def __init__(self, blind: bool) -> None:
        super().__init__()
        self.blind, self.all = blind, []  # type: ignore[var-annotated]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if self.blind else super().__torch_function__(func, types, args, kwargs)

    def _pack(self, tensor: Tensor) -> Any:
        kept = super()._pack(tensor)
        self.all.append(kept)
        return kept


@pytest.mark.parametrize("create_graph", [False, True])
def test_memory(create_graph: bool) -> None:
    """Of a forward pass, WRN's every other activation goes; a gradient's own graph does not keep them either."""
    net = load_model("wrn16_1", num_classes=3, image_size=16, seed=0).train()
    x, size = torch.rand(8, 3, 16, 16), {}
    for blind in (True, False):
        with second_derivatives(), Counting(blind) as block:
            loss = net(x).square().sum()
            g = torch.autograd.grad(loss, list(net.parameters()), create_graph=True) if create_graph else ()
        block.last = None
        storages = {k.tensor.untyped_storage() for k in block.all if k.tensor is not None}
        size[blind] = sum(s.nbytes() for s in storages if s.nbytes() >= 8 * 4 * 4 * 64 * 4)  # a map, not a weight
        del loss, g
    # kept before: BatchNorm's input and ReLU's output, and with the gradient's graph as many gradients again
    assert size[False] < (0.8 if create_graph else 0.65) * size[True]
    assert size[False] > (0.6 if create_graph else 0.35) * size[True]


def test_a_network_that_writes_into_its_activations() -> None:
    """What was changed after the activation is not what the recipe makes: then it is kept, as it is."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.norm(x))
            y += 1
            half: Tensor = self.conv(y)[:, :1] + self.conv(y[:, :, 1:])[:, :1].mean()
            return half

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Writes().double().train()
    x = numbers(4, 3, 6, 6).requires_grad_()
    found = []
    for again in (False, True):
        with recomputed() if again else nullcontext():
            loss = net(x).square().sum()
        found.append(torch.autograd.grad(loss, [x, *net.parameters()]))
    same(list(found[0]), list(found[1]))


def test_what_was_changed_in_place_after_the_forward_pass_is_an_error() -> None:
    norm, conv = nn.BatchNorm2d(3).train(), nn.Conv2d(3, 3, 3)
    with recomputed():
        x = conv(torch.rand(2, 3, 8, 8))
        loss = conv(F.relu(norm(x))).sum()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match=r"\[2, 3, 6, 6\].*changed in place.*`x = x \+ y`"):
        loss.backward()
    with recomputed():
        x = torch.rand(2, 3, requires_grad=True).exp()  # keeps its output; no recipe in it
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        x.sum().backward()


def test_eval_mode_low_precision_and_a_second_pass() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = chain(nn.ReLU(), nn.ReLU())
    x = torch.rand(4, 3, 8, 8)
    for mode in (True, False):
        found = []
        for again in (False, True):
            one = copy.deepcopy(net).train(mode)
            with torch.autocast("cpu", dtype=torch.bfloat16), recomputed() if again else nullcontext():
                loss = one(x).float().square().sum() + one(x.flip(0)).float().sum()
            loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]))
        assert torch.allclose(*found, rtol=1e-2, atol=1e-3 * float(found[0].abs().max()))
