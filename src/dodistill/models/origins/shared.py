"""What each origin returns, and what origins have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import DodistillError

Space = tuple[list[float], list[float]]  #: (mean, std) of a normalisation of images in [0, 1], per channel


@dataclass(frozen=True)
class Built:
    """A network, and what its origin knows of it."""

    net: nn.Module
    space: Space | None = None  #: the normalisation that its published weights were trained with
    num_classes: int | None = None
    in_channels: int | None = None
    image_size: Any = None  #: pixels of a side or (height, width), of published weights
    whole: nn.Module | None = None  #: the `Normalized` that a factory returned
    config: Mapping[str, Any] | None = None  #: what builds the network again, if its name alone does not


def fitting(mean: Sequence[float], std: Sequence[float], channels: int | None) -> Space | None:
    """A normalisation for a network of `channels`: of one channel, the mean over those given; None if it does not
    fit."""
    if channels == 1 and len(mean) > 1:
        return [sum(mean) / len(mean)], [sum(std) / len(std)]
    return (list(mean), list(std)) if channels is None or len(mean) in (1, channels) else None


def require_classes(spec: str, published: int, wanted: int | None) -> None:
    """Refuse published weights whose classifier does not have the `wanted` classes: it would be drawn at random."""
    if not published:
        raise DodistillError(f"the published weights of {spec} have no classifier; name weights that have one.")
    if wanted not in (None, published):
        raise DodistillError(
            f"the published weights of {spec} have {published} classes, but num_classes is {wanted}; use {published}, "
            "or weights of your own."
        )


def unreachable(spec: str, error: BaseException, fetch: str) -> DodistillError:
    """The error for published weights that neither the network nor a local cache gives. `fetch`: how to get them."""
    reason = next((line for line in str(error).strip().splitlines() if line), type(error).__name__)
    return DodistillError(
        f"the published weights of {spec} are not here, and cannot be fetched ({reason}). Check the name and the "
        f"network, {fetch}, or give a file of weights in place of `pretrained`."
    )
