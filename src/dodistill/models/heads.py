"""A classifier that reads the context of its input. It replaces the last Linear of a network.

CID (Deng and Zhang, NeurIPS 2021) deploys z' = W' [f ; ctx] + b' in place of z = W f + b: f the penultimate features,
C [K, d] a dictionary of one prototype per class, and ctx a mean of prototypes,

    ctx = q C,   q = softmax(z / T)   softened: the input's own prediction, as released
                 q = P(c)             prior: the classes' shares, the back-door formula as written
                 q = 1 / K            uniform

The network remains one module with one state dict and no hooks, so that it is saved, loaded and exported like any
other.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DodistillError
from .taps import classifier

WEIGHTS = ("softened", "prior", "uniform")


def context(z: Tensor, C: Tensor, share: Tensor, temperature: float, weights: str) -> Tensor:
    """ctx [B, d] for logits z [B, K], prototypes C [K, d] and the classes' shares [K]."""
    q = torch.softmax(z / temperature, 1) if weights == "softened" else share.expand_as(z)
    return q @ C


class ContextHead(nn.Module):
    """[B, d] -> z' [B, K]. `classifier` is the replaced Linear, and `head` maps [f ; ctx] to z'."""

    share: Tensor  #: [K], read unless the weights are softened

    def __init__(self, linear: nn.Linear, temperature: float, weights: str) -> None:
        super().__init__()
        K, d, like = linear.out_features, linear.in_features, linear.weight
        self.temperature, self.weights = float(temperature), str(weights)
        self.classifier = linear
        self.head = nn.utils.skip_init(nn.Linear, 2 * d, K, device=like.device, dtype=like.dtype)
        self.C = nn.Parameter(torch.zeros(K, d, device=like.device, dtype=like.dtype), requires_grad=False)
        self.register_buffer("share", torch.zeros(K, device=like.device, dtype=like.dtype))

    def forward(self, f: Tensor) -> Tensor:
        ctx = context(self.classifier(f), self.C, self.share, self.temperature, self.weights)
        logits: Tensor = self.head(torch.cat([f, ctx.to(f.dtype)], 1))
        return logits


def find(net: nn.Module) -> ContextHead | None:
    """The context head of a network, or None."""
    return next((m for m in net.modules() if isinstance(m, ContextHead)), None)


def describe(net: nn.Module) -> dict[str, Any]:
    """What `attach` needs to put an empty head of the same kind into a bare network; {} for a network without one."""
    head = find(net)
    return {} if head is None else {"head": {"temperature": head.temperature, "weights": head.weights}}


def attach(net: nn.Module, temperature: float = 4.0, weights: str = "softened") -> ContextHead:
    """Put an empty head around the last Linear of `net`, in place. Raises DodistillError where that cannot be done."""
    name, linear = classifier(net)
    if not isinstance(linear, nn.Linear) or not name:
        raise DodistillError(
            "a context head replaces a Linear inside the network, but this network has none; use another network."
        )
    if find(net) is not None:
        raise DodistillError("this network already has a context head; use the network without it.")
    if weights not in WEIGHTS:
        raise DodistillError(f"context head: weights is {weights!r}; use one of {', '.join(WEIGHTS)}.")
    parent, _, last = name.rpartition(".")
    head = ContextHead(linear, temperature, weights)
    setattr(net.get_submodule(parent), last, head)
    return head


@torch.no_grad()
def with_context(
    net: nn.Module, head: nn.Linear, C: Tensor, share: Tensor, temperature: float, weights: str
) -> nn.Module:
    """A copy of `net` with this context head. `net` stays unchanged."""
    out = copy.deepcopy(net)
    new = attach(out, temperature, weights)
    for mine, given in ((new.head.weight, head.weight), (new.head.bias, head.bias), (new.C, C), (new.share, share)):
        mine.copy_(given)
    return out
