"""Inputs and weights that a formula makes, for other code to be run on the same numbers anywhere.

The numbers of tests/golden/*.json come from the released code of each method, run on what this file makes. No random
stream takes part: streams differ between versions of PyTorch, formulas do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """sin(phase + 0.9 i + 0.37 i^2), i = 0, 1, ... in row-major order: computed in fp64, returned in fp32.

    It looks like noise: mean about 0, variance about 1/2, no period.
    """
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(phase + 0.9 * i + 0.37 * i * i).float().view(shape)


def gauss(*shape: int, phase: float = 0.0) -> Tensor:
    """sqrt(2) `wave`: mean about 0 and variance about 1, in place of a normal draw."""
    return math.sqrt(2) * wave(*shape, phase=phase)


def images(*shape: int, phase: float = 0.0) -> Tensor:
    """0.5 + 0.4 `wave`: in [0.1, 0.9]."""
    return 0.5 + 0.4 * wave(*shape, phase=phase)


def labels(n: int, classes: int = 10) -> Tensor:
    """[n] long, (3 i + 1) mod classes."""
    return (3 * torch.arange(n) + 1) % classes


@torch.no_grad()
def fill(module: nn.Module, phase: float = 0.0) -> nn.Module:
    """Set all floating tensors of the state dict, in its order: the k-th has `wave` of phase + k, scaled by its kind.

    Two or more dimensions: 2 wave / sqrt(elements per output); running_var: 1 + wave / 2; running_mean: 0.3 wave;
    other weights: 1 + 0.2 wave; other vectors (biases): 0.1 wave. Returns the module.
    """
    floating = [(name, t) for name, t in module.state_dict().items() if t.is_floating_point()]
    for k, (name, t) in enumerate(floating):
        w = wave(*t.shape, phase=phase + k)
        if t.dim() > 1:
            t.copy_(2 * w / math.sqrt(t[0].numel()))
        elif name.endswith("running_var"):
            t.copy_(1 + w / 2)
        elif name.endswith("running_mean"):
            t.copy_(0.3 * w)
        elif name.endswith("weight"):
            t.copy_(1 + 0.2 * w)
        else:
            t.copy_(0.1 * w)
    return module


class Net(nn.Module):
    """A classifier of two convolutions with BatchNorm: [B, C, H, W] -> logits [B, classes], in normalised coordinates.

    With `features` it also returns the input of its classifier, [B, 8 width].
    """

    def __init__(self, width: int = 6, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor, features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        f = F.adaptive_avg_pool2d(self.bn2(self.conv2(x)), 2).flatten(1)  # of either sign: many classes are answered
        logits: Tensor = self.fc(f)
        return (logits, f) if features else logits


def net(phase: float = 0.0, classes: int = 10, width: int = 6, channels: int = 3) -> nn.Module:
    """A `Net` filled by the formula, in eval mode."""
    return fill(Net(width, classes, channels), phase).eval()


class Attention(nn.Module):
    """Self-attention of two heads over tokens [B, N, 12]. The layers have timm's names."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 2, 6**-0.5
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.attn_drop, self.proj_drop = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))
        return out


class Block(nn.Module):
    """Attention beside a shortcut, and a layer with a nonlinearity beside another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(12), Attention()
        self.norm2, self.fc = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + F.gelu(self.fc(self.norm2(x)))


class Vit(nn.Module):
    """A transformer of two blocks: [B, 3, 16, 16] -> 16 patches and a class token -> logits [B, 10]."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.empty(1, 1, 12)), nn.Parameter(torch.empty(1, 17, 12))
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def digest(tensors: Tensor | Iterable[Tensor]) -> list[float]:
    """Two numbers that stand for tensors: their norm, and their product with `wave`, divided by the wave's norm.

    The second is at most the first; compare both relative to the norm (`alike`).
    """
    parts = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    flat = torch.cat([t.detach().double().reshape(-1) for t in parts])
    w = wave(len(flat)).double()
    return [float(flat.norm()), float(flat @ w / w.norm())]


def close(mine: list[float] | float, theirs: list[float] | float, rel: float = 1e-4) -> bool:
    """Is each number equal to the released one, relative to that?"""
    a = [mine] if isinstance(mine, int | float) else mine
    b = [theirs] if isinstance(theirs, int | float) else theirs
    return len(a) == len(b) and all(abs(x - y) <= rel * abs(y) for x, y in zip(a, b))


def alike(mine: list[float], theirs: list[float], rel: float = 1e-4) -> bool:
    """Are two `digest`s equal, relative to the norm?"""
    return len(mine) == len(theirs) and all(abs(x - y) <= rel * theirs[0] for x, y in zip(mine, theirs))


class Draws:
    """Stands in for random draws, in the released code and in ours: functions with the signatures of torch's.

    `call` is the number of the acquisition, to be set before each, so that acquisitions differ.
    """

    def __init__(self) -> None:
        self.call = 0

    def randn(self, *shape: Any, **options: Any) -> Tensor:
        """`gauss` of that shape, at the phase call + number of elements."""
        given = options.get("size", shape)
        size = tuple(given[0] if len(given) == 1 and not isinstance(given[0], int) else given)
        return gauss(*size, phase=self.call + math.prod(size)).requires_grad_(bool(options.get("requires_grad")))

    def randint(self, *bounds: Any, **options: Any) -> Tensor:
        """Of n > 2 draws `labels`; of two a roll, (1, -1); of one 1: mirror the batch."""
        (n,) = options.get("size") or next(b for b in bounds if not isinstance(b, int))
        high = options.get("high") or [b for b in bounds if isinstance(b, int)][-1]
        return labels(n, high) if n > 2 else torch.tensor([1, -1][:n])
