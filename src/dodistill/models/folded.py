"""A network for inference only: its BatchNorms are folded into the layers before them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..functional.memory_format import place

#: Largest difference of logits, relative to the largest logit, that counts as rounding.
ROUNDING = 1e-4

#: Functions that read a value out of a tensor. A forward pass that calls one may take another path for other images.
_READS = {"__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy"}


class _Uses(TorchFunctionMode):
    """Counts how many functions read each output of the watched layers, in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[int, int] = {}
        self.reads_values = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.reads_values |= getattr(func, "__name__", "") in _READS
        if any(isinstance(v, Tensor) for v in tree_leaves(out)):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.count:
                    self.count[id(leaf)] += 1
        return out


def pairs(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """(layer, BatchNorm) by name: only the BatchNorm reads the layer's output, and both are called once on x."""
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors, so that their ids stay unique
    calls: dict[str, int] = {}
    found: list[tuple[str, str, Tensor]] = []
    uses = _Uses()

    def after_layer(name: str, out: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        made[id(out)] = name, out
        uses.count[id(out)] = 0

    def before_norm(name: str, read: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if id(read) in made:
            found.append((made[id(read)][0], name, read))

    handles = []
    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear):  # a subclass may do more
            handles.append(module.register_forward_hook(lambda _m, _x, out, name=name: after_layer(name, out)))
        elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(lambda _m, x, name=name: before_norm(name, x[0])))
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), uses:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if uses.reads_values:
        return []
    return [(a, b) for a, b, out in found if uses.count[id(out)] == 1 and calls[a] == calls[b] == 1]


def _fused(model: nn.Module, both: list[tuple[str, str]]) -> nn.Module:
    """A copy of `model` in which each (layer, BatchNorm) of `both` is one layer."""
    copied = copy.deepcopy(model)
    for layer_name, norm_name in both:
        layer, norm = copied.get_submodule(layer_name), copied.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        fused = fuse_conv_bn_eval(layer, norm) if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval(layer, norm)  # type: ignore[type-var]
        for name, module in ((layer_name, fused), (norm_name, nn.Identity())):
            parent, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(parent), leaf, module)
    return copied


def folded(model: nn.Module, x: Tensor) -> nn.Module | None:
    """A copy of `model` in eval mode, with each BatchNorm that follows a convolution or a linear layer folded into it.

    Args:
        model: from images [B, C, H, W] in [0, 1] to logits [B, K], in eval mode.
        x: a few images, on which the layers are found and the copy is compared with the model.

    Returns:
        The copy, in the package's memory format. None where no BatchNorm can be folded, where the model reads values
        out of tensors (its path may depend on the image), and where the copy's logits of `x` differ beyond rounding.
    """
    both = pairs(model, x)
    if not both:
        return None
    try:
        copied = _fused(model, both)
    except Exception:  # a model that cannot be copied, or layers that cannot be fused
        return None
    place(copied)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        theirs, mine = model(x).float(), copied(x).float()
    same = (mine - theirs).abs().max() <= ROUNDING * theirs.abs().max().clamp_min(1)
    return copied if bool(same) else None
