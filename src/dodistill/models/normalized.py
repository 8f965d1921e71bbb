"""A network with the normalisation of its training, as one module on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DodistillError, nearest, positive

Values = Sequence[float]
Space = tuple[Tensor, Tensor]  #: (mean, std) of a normalisation, [1, C or 1, 1, 1]

#: (mean, std) per channel. The CIFAR-10 std is the literature's (a mean of per-image stds), which its checkpoints need.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
    "none": ((0.0,), (1.0,)),
}


class UnknownNormalisation(DodistillError):
    """Weights do not say which normalisation their network was trained with, and the user did not either."""

    def __init__(self, weights: str, flag: str = "") -> None:
        self.weights = weights
        names = ", ".join(name for name in NORMALISATION if name != "none")
        super().__init__(
            f"{weights} does not say which normalisation its network was trained with; give {flag}normalise NAME "
            f"({names}, or none if it reads images in [0, 1]), or {flag}mean 0.5,0.5,0.5 {flag}std 0.5,0.5,0.5. If it "
            f"reads 0 to 255, give {flag}input_range 255 with mean and std in this range, as 127.5, or without both."
            if flag
            else f"{weights} does not say which normalisation its network was trained with; give mean=NAME ({names}, "
            "or none if it reads images in [0, 1]), or mean=[...] and std=[...]. If it reads 0 to 255, give "
            "input_range=255 with mean and std in this range, as 127.5, or without both."
        )


class Normalized(nn.Module):
    """`model((x - mean) / std)` for x [B, C, H, W] in [0, 1]: the logits [B, K] alone, whatever `model` returns beside
    them (see `logits_of`).

    `mean` and `std` have one value per channel, or one for all. `spec` says how to build `model` again where that is
    known: `spec, num_classes, in_channels, image_size` (a number for square images, else (height, width)), and
    `classes`, the names of the classes. The state dict holds the network alone.
    """

    mean: Tensor  #: [1, C or 1, 1, 1]
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Values = (0.0,), std: Values = (1.0,), spec: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or not all(s > 0 for s in std):
            raise DodistillError(
                f"mean {list(mean)} and std {list(std)} must have the same length, and std must be > 0."
            )
        self.model = model
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.identity = all(m == 0 for m in mean) and all(s == 1 for s in std)
        self.spec: dict[str, Any] = dict(spec or {})

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x if self.identity else (x - self.mean) / self.std), type(self.model).__name__)


def logits_of(out: Any, who: str) -> Tensor:
    """The logits in the answer of a network: a tensor, an object with `.logits`, or a mapping with ["logits"].

    Raises DodistillError, which names `who` answered, for anything else.
    """
    if isinstance(out, Tensor):
        return out
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        keys = f" with the keys {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
        raise DodistillError(
            f"{who} returns a {type(out).__name__}{keys}, not a tensor of logits, nor an object or dict with `logits`; "
            "wrap it in a module that returns the logits alone."
        )
    return logits


def answering(model: nn.Module, out: Any, who: str) -> tuple[nn.Module, Tensor]:
    """(a module that returns logits alone, the logits), for a `model` that has returned `out`.

    It is `model` itself, or a `Normalized` around it. Raises DodistillError where `out` has no logits.
    """
    logits = logits_of(out, who)
    return (model if isinstance(out, Tensor) else Normalized(model)), logits


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's classes, in the order of its logits; () where they are not known."""
    seen: nn.Module | None = model
    while seen is not None:
        spec = getattr(seen, "spec", None)
        if isinstance(spec, dict) and spec.get("classes"):
            return tuple(map(str, spec["classes"]))
        inner = getattr(seen, "model", None)
        seen = inner if isinstance(inner, nn.Module) else None
    return ()


def normalised_space(model: nn.Module) -> Space:
    """The mean and deviation that `model` expects of images in [0, 1]: those of a `Normalized`, else 0.5 and 0.25.

    A `Normalized` that reads pixels as they are ("none") or in another range (`input_range`) has constants that images
    in [0, 1] cannot have. It gets 0.5 and 0.25 too: pixels of deviation 1 / 255 are black, and of 1 mostly clipped.
    """
    if isinstance(model, Normalized):
        mean, std = model.mean, model.std
        if bool(((mean > 0) & (mean < 1) & (std >= 0.05) & (std < 1)).all()):
            return mean, std
    return torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.25)


def constants(
    mean: str | Values | None, std: str | Values | None, channels: int | None, input_range: float = 1.0
) -> tuple[list[float], list[float]] | None:
    """(mean, std) of the arguments, for images in [0, 1]; None without arguments. A name of NORMALISATION sets both.

    The network reads images in [0, `input_range`], and values are in this range; alone, it stands for no further
    normalisation. Raises DodistillError for an unknown name, one of the two without the other, a length that is not
    `channels`, and a name with a range, which it has.
    """
    positive("", ", as in 255", input_range=input_range)
    if mean is None and std is None:
        if input_range == 1:
            return None
        mean = "none"
    if isinstance(mean, str) or isinstance(std, str):
        name = mean if isinstance(mean, str) else std
        assert isinstance(name, str)
        if name not in NORMALISATION:
            raise DodistillError(nearest(name, NORMALISATION, "normalisation"))
        if (mean is not None and mean != name) or (std is not None and std != name):
            raise DodistillError(f"mean is {mean!r} and std is {std!r}; the name {name!r} sets both, so give it alone.")
        mean, std = NORMALISATION[name]
        if input_range != 1 and name != "none":
            raise DodistillError(
                f"normalisation {name} is for inputs in [0, 1], but input_range is {input_range:g}; give mean and std "
                "in that range, or remove it."
            )
    if mean is None or std is None:
        raise DodistillError(f"mean is {mean} and std is {std}: give both, or one name of {', '.join(NORMALISATION)}.")
    for values in (mean, std):
        if channels is not None and len(values) not in (1, channels):
            raise DodistillError(
                f"normalisation has {len(values)} channels ({list(values)}), but the model takes {channels}; "
                f"give {channels} values, or one for all."
            )
    return [float(v) / input_range for v in mean], [float(v) / input_range for v in std]
