"""Where networks come from: the zoo, a file of the user's, timm, torchvision, and Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import DodistillError
from .. import zoo
from . import factory, huggingface, libraries
from .shared import Built

__all__ = ["LIBRARIES", "Built", "build"]

#: The libraries that a spec may name, as in timm:NAME. Each knows its networks' published weights and normalisation.
LIBRARIES = ("timm", "torchvision", "hf")


def build(
    spec: str,
    num_classes: int | None,
    in_channels: int | None,
    image_size: Any = None,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Built:
    """The network that `spec` names, with fresh weights, or with its published ones if `pretrained`.

    `config`: that of a Hugging Face network, as a file of weights keeps it; without it, it is read by the name.
    """
    if ".py:" in spec:
        return factory.build(spec, num_classes, in_channels)
    origin, colon, name = spec.partition(":")
    if colon and origin == "timm":
        return libraries.from_timm(name, num_classes, in_channels, image_size, pretrained)
    if colon and origin == "torchvision":
        return libraries.from_torchvision(name, num_classes, in_channels, pretrained)
    if colon and origin == "hf":
        return huggingface.build(name, num_classes, in_channels, image_size, pretrained, config)
    if num_classes is None and (spec in zoo.zoo_names() or spec.startswith("tiny")):
        raise DodistillError(f"cannot infer num_classes for {spec}; pass it, or weights to read it from.")
    return Built(zoo.build(spec, num_classes or 1, in_channels or zoo.default_channels(spec)))
