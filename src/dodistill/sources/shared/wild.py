"""Unlabelled images that a method reads repeatedly: all of them or a chosen part."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.context import Context
from ...data.rows import Rows


class WildImages:
    """The images of `context.unlabeled` at `keep`, read as they are drawn."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.keep = torch.empty(0, dtype=torch.long)  #: indices of the kept images; empty: all
        self._rows: Rows | None = None

    @property
    def rows(self) -> Rows:
        """The kept images."""
        if self._rows is None:
            x = self.context.unlabeled
            assert x is not None  # the job checks `needs` before the run begins
            self._rows = x.select(self.keep) if len(self.keep) else x
        return self._rows

    def choose(self, keep: Tensor) -> None:
        """Keep the images at these indices only."""
        self.keep, self._rows = keep.cpu(), None

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n of the kept images, drawn with replacement, uint8, on the run's device."""
        device = self.context.device
        return self.rows[torch.randint(len(self.rows), (n,), generator=generator, device=device)].to(device)
