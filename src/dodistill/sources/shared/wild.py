"""Unlabelled images that a method reads repeatedly: on the run's device, all of them or a chosen part."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.context import Context


class WildImages:
    """The images of `context.unlabeled` at `keep`. They move to the device when they are first read."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.keep = torch.empty(0, dtype=torch.long)  #: indices of the kept images; empty: all
        self._images: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """uint8 [n, C, H, W], on the run's device."""
        if self._images is None:
            x = self.context.unlabeled
            assert x is not None  # the job checks `needs` before the run begins
            self._images = (x[self.keep.to(x.device)] if len(self.keep) else x).to(self.context.device)
        return self._images

    def choose(self, keep: Tensor) -> None:
        """Keep the images at these indices only."""
        self.keep, self._images = keep.cpu(), None

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n of the kept images, drawn with replacement, uint8."""
        return self.images[torch.randint(len(self.images), (n,), generator=generator, device=self.context.device)]
