"""Transfer and bias of a student: a linear probe on another data set, and the accuracy gap between contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..core.runtime import at_once, generator
from ..data.folder import crop_share
from ..data.images import Images, Shape, has_test, load_images, refuse_one_class
from ..errors import DodistillError
from ..functional.augment import to_float
from ..functional.memory_format import laid_out
from ..functional.modes import evaluating
from ..functional.schedules import cosine
from ..models import heads
from ..models.taps import classifier
from .evaluate import Autocast, accuracy, top1


def feature_layer(model: nn.Module) -> nn.Module:
    """The layer that reads the penultimate features. Raises DodistillError for a network without one."""
    return heads.find(model) or classifier(model)[1]


@torch.no_grad()
def features(model: nn.Module, x: Tensor, batch: int = 1000, autocast: Autocast = contextlib.nullcontext) -> Tensor:
    """fp32 [n, d], the penultimate features of images uint8 [n, C, H, W], in eval mode: BatchNorm is frozen too.

    For a student with a context head, these are the plain features, without its contexts.
    """
    layer = feature_layer(model)
    device = next(model.parameters()).device
    seen: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
        f: Tensor = args[0]
        seen.append(f.flatten(2).mean(2).float() if f.dim() == 4 else f.float())

    handle = layer.register_forward_pre_hook(record)
    try:
        with evaluating(model):
            for part in x.split(at_once(device, batch)):
                with autocast():
                    model(laid_out(to_float(part.to(device))))
    finally:
        handle.remove()
    return torch.cat(seen)


def halves(spec: str, image_shape: Shape, crop: float = 0.0) -> tuple[Images, Images]:
    """The training and test images of labelled data for a linear probe, resized to `image_shape`; both of a folder are
    cropped as test images are.

    Raises DodistillError, besides `load_images`'s, for data without labels, of one class, or without a test set of its
    own, which is known before any image is decoded.
    """
    if not has_test(spec):
        raise DodistillError(
            f"--probe {spec} has no test images of its own, and a probe is not scored on those that it learned "
            "from; give a folder with train and test."
        )
    share = crop_share(crop, image_shape[1])  # 0 would be another one for training images

    def part(split: str) -> Images:
        images = load_images(spec, split, True, image_shape, crop=share, resize=True)
        if images.y is None:
            raise DodistillError(f"{spec} has no labels, which a probe needs; give labelled images.")
        refuse_one_class(images, spec)
        return images

    return part("train"), part("test")


def linear_probe(
    model: nn.Module,
    train: Images,
    test: Images,
    epochs: int = 30,
    lr: float = 0.1,
    batch: int = 256,
    seed: int = 0,
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, float]:
    """Accuracy (%) on `train` and `test` of a linear classifier on the frozen features of `model`.

    As in the transfer experiments of CRD and CID, the model is frozen, including its BatchNorm, and the classifier has
    no weight decay. It starts at 0 and learns by SGD (momentum 0.9, cosine to 0) on features that are computed once,
    without augmentation, and scaled to mean 0 and deviation 1 over `train`. Raises DodistillError without labels.
    """
    if train.y is None or test.y is None:
        raise DodistillError("these images have no labels; a probe needs them: give labelled images.")
    f, g = features(model, train.x, autocast=autocast), features(model, test.x, autocast=autocast)
    std, mean = torch.std_mean(f, 0, correction=0)
    f, g = ((v - mean) / std.clamp_min(1e-6) for v in (f, g))
    y = train.y.to(f.device)
    linear = nn.utils.skip_init(nn.Linear, f.shape[1], max(train.num_classes, test.num_classes), device=f.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9)
    stream, batch = generator(f.device, seed, "probe"), min(batch, len(f))
    steps, step = epochs * (len(f) // batch), 0
    for _ in range(epochs):
        for index in torch.randperm(len(f), generator=stream, device=f.device).split(batch)[: len(f) // batch]:
            optimizer.param_groups[0]["lr"] = cosine(step, lr, of=steps)
            optimizer.zero_grad()
            nnf.cross_entropy(linear(f[index]), y[index]).backward()
            optimizer.step()
            step += 1

    with torch.no_grad():
        return {"train": top1(linear(f), y), "test": top1(linear(g), test.y)}


def context_gap(
    model: nn.Module, pair: Sequence[Images], autocast: Autocast = contextlib.nullcontext
) -> dict[str, float]:
    """Accuracy (%) on the two of `data.contexts_of`, aligned and conflicting, and the gap between them.

    A network that ignores the context has a gap of 0; one that reads only the context has 100.
    """
    a, c = (accuracy(model, images, autocast=autocast) for images in pair)
    return {"aligned": a, "conflicting": c, "gap": a - c}
