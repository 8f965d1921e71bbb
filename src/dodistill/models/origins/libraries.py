"""`timm:NAME` and `torchvision:NAME`: networks of two libraries, which know the normalisation of their weights."""

from __future__ import annotations

import difflib
import pickle
from typing import Any

import torch

from ...errors import DodistillError, nearest
from ..normalized import NORMALISATION
from .shared import Built, fitting, require_classes, unreachable


def from_timm(name: str, classes: int | None, channels: int | None, size: Any, pretrained: bool) -> Built:
    """timm adapts published weights to another number of channels, and a ViT's to another image size."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise DodistillError(f"timm:{name} needs timm ({error}): pip install 'dodistill[timm]'") from error
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise DodistillError(f"timm has no model {name!r}; similar names: {', '.join(close) or 'none'}.")
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the name after the point is unknown
        known = [full.partition(".")[2] for full in timm.list_models(f"{bare}.*", pretrained=True)]
        raise DodistillError(f"timm:{bare}: {nearest(tag, known, 'weights')}") from error
    kwargs: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if channels is not None:
        kwargs["in_chans"] = channels
    if pretrained:
        if published is None or not published.has_weights:
            there = timm.list_models(f"{bare}.*", pretrained=True)
            raise DodistillError(f"timm has no published weights of {name}; it has {', '.join(there) or 'none'}.")
        require_classes(f"timm:{name}", published.num_classes, classes)
    net: Any
    try:
        try:
            net = timm.create_model(name, pretrained=pretrained, **(kwargs | ({"img_size": size} if size else {})))
        except TypeError:  # convolutional networks take no img_size
            net = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # the hub's client raises many kinds
        if not pretrained:
            raise
        raise unreachable(f"timm:{name}", error, "or run the command once where there is one") from error
    cfg = net.pretrained_cfg
    return Built(
        net, fitting(cfg["mean"], cfg["std"], channels), net.num_classes, channels or cfg["input_size"][0],
        tuple(cfg["input_size"][1:]) if pretrained else None,
    )  # fmt: skip


def from_torchvision(name: str, classes: int | None, channels: int | None, pretrained: bool) -> Built:
    """Published weights are the default ones of the installed version, with the normalisation of their transforms."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise DodistillError(
            f"torchvision:{name} needs a torchvision that fits this torch ({error}): pip install 'dodistill[timm]'"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        raise DodistillError(nearest(name, known, "torchvision model"))
    if channels not in (None, 3):
        raise DodistillError(f"torchvision:{name} takes 3 channels, not {channels}; use the zoo or timm:NAME.")
    if not pretrained:
        net = models.get_model(name, weights=None, **({} if classes is None else {"num_classes": classes}))
        mean, std = NORMALISATION["imagenet"]
        return Built(net, (list(mean), list(std)), classes, 3)
    weights: Any = models.get_model_weights(name).DEFAULT
    published = len(weights.meta["categories"])
    require_classes(f"torchvision:{name}", published, classes)
    try:
        # First as tensors alone: torchvision's own reading below would run the code of a pickle that is no state dict.
        weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        net = models.get_model(name, weights=weights, progress=False)
    except pickle.UnpicklingError as error:
        place = f"{torch.hub.get_dir()}/checkpoints"
        raise DodistillError(
            f"the file of {weights.url} in {place} would run code when read, or is damaged; refused. Delete it."
        ) from error
    except Exception as error:
        fetch = f"or download {weights.url} once into {torch.hub.get_dir()}/checkpoints"
        raise unreachable(f"torchvision:{name}", error, fetch) from error
    transforms = weights.transforms()
    return Built(net, (list(transforms.mean), list(transforms.std)), published, 3, transforms.crop_size[0])
