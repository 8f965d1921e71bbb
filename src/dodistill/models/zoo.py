"""The names of our own networks, and how each is built."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import DodistillError, nearest
from . import cifar_resnet, mobilenetv2, vgg, wrn
from .tiny import Tiny
from .vit import HEAD, TinyViT

_BUILDERS = {**cifar_resnet.ZOO, **mobilenetv2.ZOO, **vgg.ZOO, **wrn.ZOO}


def zoo_names() -> list[str]:
    """Every name of the zoo; of the families `tiny{W}` and `tinyvit{W}`, only the usual widths."""
    return sorted(_BUILDERS) + ["tiny8", "tiny16", "tiny32", "tinyvit48"]


def default_channels(name: str) -> int:
    """1 for the digits' families `tiny{W}` and `tinyvit{W}`, 3 for the rest."""
    return 1 if re.fullmatch(r"tiny(vit)?\d+", name) else 3


def fitting(state: Mapping[str, Tensor], num_classes: int, in_channels: int) -> list[str]:
    """The networks of the zoo that have exactly these keys and shapes, BatchNorm's step counters apart."""
    wanted = {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}
    found = []
    for name in zoo_names():
        with torch.device("meta"):  # no memory, no random numbers
            own = build(name, num_classes, in_channels).state_dict()
        if wanted == {k: v.shape for k, v in own.items() if not k.endswith("num_batches_tracked")}:
            found.append(name)
    return found


def build(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """A freshly initialised network. Raises DodistillError, with the nearest names, for an unknown name."""
    tiny = re.fullmatch(r"tiny([1-9]\d{0,3})", name)
    if tiny:
        return Tiny(int(tiny[1]), num_classes, in_channels)
    vit = re.fullmatch(r"tinyvit([1-9]\d{0,3})", name)
    if vit and int(vit[1]) % HEAD == 0:
        return TinyViT(int(vit[1]), num_classes, in_channels)
    if name not in _BUILDERS:
        raise DodistillError(nearest(name, zoo_names(), "model"))
    return _BUILDERS[name](num_classes, in_channels)
