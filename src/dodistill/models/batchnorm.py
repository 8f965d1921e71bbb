"""BatchNorm layers and their running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional.augment import to_float


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d | nn.SyncBatchNorm]:
    """The BatchNorm layers of `model` that keep running statistics, in order of definition."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]


@contextmanager
def reached(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The layers of `batchnorms` that the passes within the block use."""
    found: set[nn.Module] = set()

    def note(layer: nn.Module, _args: object) -> None:
        found.add(layer)

    handles = [m.register_forward_pre_hook(note) for m in batchnorms(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def current_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block, every BatchNorm of `model` normalises with the statistics of the current batch, as in train
    mode.

    The block neither uses nor changes the running statistics. It changes no other layer.
    """
    kept = [(m, m.running_mean, m.running_var) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for m, _, _ in kept:
            m.running_mean = m.running_var = None  # PyTorch's value for a layer without running statistics
        yield
    finally:
        for m, mean, var in kept:
            m.running_mean, m.running_var = mean, var


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, batch: int = 256) -> nn.Module:
    """Set the running statistics of every BatchNorm of `model` to those of `images`, in place: the mean over batches.

    `images` are float in [0, 1] or uint8, [n, C, H, W]. A few suffice, and no labels are needed. Returns the model, in
    eval mode.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [m.momentum for m in layers]
    first = next(model.parameters(), images)
    model.eval()
    try:
        for m in layers:
            m.reset_running_stats()
            m.momentum = None  # PyTorch's value for the plain mean
            m.train()
        for part in images.tensor_split(-(-len(images) // batch)):
            here = part.to(first.device)
            model(here if here.is_floating_point() else to_float(here))
    finally:
        for m, momentum in zip(layers, momenta):
            m.momentum = momentum
    return model.eval()
