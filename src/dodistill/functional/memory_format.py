"""The package's one memory format, channels_last: every network and every batch is brought into it here."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def place(model: M, device: torch.device | None = None) -> M:
    """`model`, in place, on `device` (None: where it is) and in the package's one memory format, channels_last.

    The kernels of two formats round differently. So every network that is loaded, trained or delivered goes through
    here, and every batch through `laid_out`: a student from its file answers as the one in memory did, on one machine
    to the bit.
    """
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def laid_out(x: Tensor) -> Tensor:
    """Images x [B, C, H, W] in the memory format of `place`."""
    return x.contiguous(memory_format=torch.channels_last)
