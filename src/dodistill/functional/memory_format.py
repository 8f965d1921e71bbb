"""The package's only memory format, channels_last: converts networks and batches to it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def place(model: M, device: torch.device | None = None) -> M:
    """`model`, in place, on `device` (None: its current device) and in the package's memory format, channels_last.

    The kernels of two formats round differently. So every network that is loaded, trained or delivered passes through
    this function, and every batch through `laid_out`. A student from its file then has the same logits as the student
    in memory, bit-identical on one machine.
    """
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def laid_out(x: Tensor) -> Tensor:
    """Images x [B, C, H, W] in the memory format of `place`."""
    return x.contiguous(memory_format=torch.channels_last)
