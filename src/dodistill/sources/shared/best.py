"""The best iterate of a descent."""

from __future__ import annotations

import torch
from torch import Tensor


class Best:
    """Keeps copies of the tensors of the iterate with the lowest loss, without waiting for the device.

    The first iterate stays while no later loss is lower. A loss of NaN is never lower.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self._lowest = torch.tensor(torch.inf)  # the loss of `tensors`, on their device

    @torch.no_grad()
    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """One iterate: its loss, a scalar, and its tensors, whose shapes never change."""
        if not self.tensors:
            self.tensors = tuple(t.detach().clone() for t in tensors)
            self._lowest = torch.full_like(loss, torch.inf)
        better = loss < self._lowest
        self.tensors = tuple(torch.where(better, new, old) for new, old in zip(tensors, self.tensors))
        self._lowest = torch.fmin(loss, self._lowest)
