"""The names of a network's classes, where its origin knows them: timm, torchvision, Hugging Face, its own code."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..data.classes import hub_names, read_names
from .normalized import class_names


def names_of_origin(spec: str, net: nn.Module, outputs: int | None) -> tuple[str, ...]:
    """The names for the `outputs` logits of a network that `load_model` has built; () where its origin knows none.

    A network of timm or torchvision with as many classes as its published weights has their names, also where its
    weights are the user's: only names that are given say otherwise.
    """
    if spec.startswith("timm:"):
        found = _of_timm(net, outputs)
    elif spec.startswith("torchvision:"):
        found = _of_torchvision(spec.removeprefix("torchvision:"))
    else:
        found = class_names(net) or _of_hub(net)
    return found if len(found) == outputs else ()


def _of_timm(net: nn.Module, outputs: int | None) -> tuple[str, ...]:
    """ImageNet's, `n01440764 tench, Tinca tinca`, by the number of classes."""
    published: Any = getattr(net, "pretrained_cfg", None) or {}
    if outputs is None or published.get("num_classes") != outputs:
        return ()
    if published.get("label_names"):
        return read_names(list(published["label_names"]))
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": outputs})
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    return tuple(f"{wnid} {info.label_name_to_description(wnid)}" for wnid in info.label_names())


def _of_torchvision(name: str) -> tuple[str, ...]:
    from torchvision import models

    try:
        weights = models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):  # published without weights
        return ()
    return read_names(list(weights.meta.get("categories", ())))


def _of_hub(net: nn.Module) -> tuple[str, ...]:
    """Of a Hugging Face model, alone or one module inside."""
    for module in (net, *net.children()):
        if names := hub_names(getattr(getattr(module, "config", None), "id2label", None)):
            return names
    return ()
