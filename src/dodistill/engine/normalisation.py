"""Whether a model's normalisation fits its first BatchNorm: a wrong one is noticed on pictures drawn by formulas.

The running statistics of the first BatchNorm are those of its inputs in training, behind one convolution as a rule. On
plain pictures its inputs have statistics of the same size, under the normalisation of the training. Another one scales
and shifts them: without any normalisation in place of ImageNet's, the variance is about 20 times too small; with inputs
up to 255 in place of 1, 65 000 times too large.

The distance of a normalisation is the median, over the channels, of the symmetric Kullback-Leibler divergence between
the normal distributions with the running and with the measured mean and variance. It is the least over three kinds of
pictures (plain, on black, on white), as the training data are not known. A warning needs a distance above `FAR`, and
another known normalisation that is `TIMES` nearer: two that hardly differ (CIFAR-10's, ImageNet's) are not told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..functional.augment import to_float
from ..functional.memory_format import laid_out
from ..functional.modes import evaluating
from ..functional.moments import Moments, channel_moments
from ..models.batchnorm import batchnorms
from ..models.normalized import NORMALISATION, Normalized
from ..sources.shared.pictures import draw, shares

Shape = tuple[int, int, int]
Space = tuple[tuple[float, ...], tuple[float, ...]]  #: (mean, std)

FAR = 1.5  #: a variance that is 5 times too large or too small
TIMES = 5.0
NEAR = 0.5  #: normalisations nearer than this are not told apart
PICTURES = 40  #: of 32x32 pixels; of larger ones fewer
SIDE = 96  #: larger pictures are cropped: the statistics do not depend on the size

#: What to give for a normalisation -> its values for images in [0, 1].
KNOWN: dict[str, Space] = {
    **{f"normalise {name}": space for name, space in NORMALISATION.items()},
    "mean 0.5 and std 0.5": ((0.5,), (0.5,)),
    "input_range 255": ((0.0,), (1 / 255,)),
    "mean 0.45, std 1 of inputs to 255": ((0.45,), (1 / 255,)),
}


def doubt(model: nn.Module, image_shape: Shape) -> str:
    """A warning, with the figures, if another known normalisation fits a model clearly better than its own; else "".

    `model`: from images [B, C, H, W] in [0, 1], C, H, W = `image_shape`, to logits. It is not changed. A model without
    BatchNorm, or whose first BatchNorm cannot be reached, gives "".
    """
    inner = model.model if isinstance(model, Normalized) else model
    own = (model.mean, model.std) if isinstance(model, Normalized) else (torch.zeros(1), torch.ones(1))
    layers = batchnorms(inner)
    if not layers:
        return ""
    device = layers[0].weight.device if layers[0].weight is not None else torch.device("cpu")
    mean, std = (v.detach().cpu().float().flatten() for v in own)
    try:
        with torch.no_grad(), evaluating(inner), torch.autocast(device.type, enabled=False):
            pictures = _pictures(image_shape, device)
            mine = min(_distances(inner, pictures, mean, std))
            if _possible(mean, std):  # data that have exactly this mean and deviation
                spread, middle = torch.std_mean(pictures[0], (0, 2, 3))
                mine = min(mine, *_distances(inner, pictures[:1], middle.cpu(), spread.cpu()))
            if not mine > FAR:
                return ""
            others = {
                name: min(_distances(inner, pictures, torch.tensor(m), torch.tensor(s)))
                for name, (m, s) in KNOWN.items()
                if len(m) in (1, image_shape[0])
            }
    except Exception:  # a model of the user's may raise anything; what is wrong with it is said where it is used
        return ""
    nearest = min(others.values())
    if not nearest * TIMES < mine:
        return ""
    good = [name for name, far in others.items() if far <= max(2 * nearest, NEAR)]
    far = sorted(f"{others[name]:.2g}" for name in good)
    figures = " to ".join(dict.fromkeys((far[0], far[-1])))
    return (
        "the normalisation may be wrong: on plain pictures the model's first BatchNorm reads statistics far from those "
        f"of its training, distance {mine:.3g}, with mean {_few(mean)} and std {_few(std)}; with "
        f"{' or '.join(good)} they are near, distance {figures}. If the model was trained so, give that."
    )


def _possible(mean: Tensor, std: Tensor) -> bool:
    """Whether images in [0, 1] can have this mean and deviation: std <= sqrt(mean (1 - mean)), here with a margin.

    Images of a deviation of a few levels are no data, but values in the wrong range: 0.5 of 255.
    """
    return bool(((std <= 0.8 * (mean * (1 - mean)).clamp_min(0).sqrt()) & (std >= 0.02)).all())


def _pictures(shape: Shape, device: torch.device) -> list[Tensor]:
    """Three kinds of pictures, each [n, C, H, W] in [0, 1]: plain ones, on black, and on white."""
    c, h, w = shape
    n = min(PICTURES, max(10, PICTURES * 32 * 32 // (h * w)))
    counts = shares((1, 1, 1, 1, 1), n)
    both = []
    for stretch in (False, True):
        x = to_float(draw(counts, (c, h, w), torch.Generator().manual_seed(0), stretch))
        top, left = (max(0, (side - SIDE) // 2) for side in (h, w))
        both.append(laid_out(x[:, :, top : top + SIDE, left : left + SIDE].to(device)))
    return [*both, 1 - both[1]]


class _Reached(Exception):
    """The first BatchNorm has its input; the rest of the network is not needed."""


@contextmanager
def _first(model: nn.Module, found: list[tuple[nn.Module, Moments]]) -> Iterator[None]:
    """Within the block, a forward pass ends at the first BatchNorm, whose layer and input moments are appended."""

    def reached(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append((layer, channel_moments(args[0])))
        raise _Reached

    handles = [m.register_forward_pre_hook(reached) for m in batchnorms(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distances(model: nn.Module, pictures: list[Tensor], mean: Tensor, std: Tensor) -> list[float]:
    """Of each kind of pictures under one normalisation."""
    found: list[tuple[nn.Module, Moments]] = []
    with _first(model, found):
        for x in pictures:
            m, s = (v.to(x.device).view(1, -1, 1, 1) for v in (mean, std))
            try:
                model((x - m) / s)
            except _Reached:
                continue
    return [_distance(layer, *moments) for layer, moments in found] or [math.inf]


def _distance(layer: nn.Module, mean: Tensor, variance: Tensor) -> float:
    """The median over the channels, without those that were nearly constant in training."""
    m, v = layer.running_mean, layer.running_var
    assert isinstance(m, Tensor)
    assert isinstance(v, Tensor)
    on = v > 0.01 * v.max()
    a, b, apart = variance[on].double() + 1e-12, v[on].double(), (mean - m)[on].double().square()
    return float((0.5 * (a / b + b / a) - 1 + 0.5 * apart * (1 / a + 1 / b)).median().detach())


def _few(values: Tensor) -> str:
    return ",".join(f"{v:.4g}" for v in values.tolist())
