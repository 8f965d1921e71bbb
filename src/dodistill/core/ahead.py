"""The student's draws, one batch ahead where the images come from a disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pool import Draw, Pool
from .ranks import Ranks


class Ahead:
    """The slots of the next batch. Of a pool on a disk, those of the batch after it are drawn, too, and read meanwhile.

    The draws are the same with and without. `undo` takes an early draw back, before the pool changes or the state of
    sampler and generator is read.
    """

    def __init__(self, pool: Pool, sampler: Draw, generator: torch.Generator, ranks: Ranks | None = None) -> None:
        """`ranks`: the processes of the run, each of which reads its part of the batch."""
        self.pool, self.sampler, self.generator, self.ranks = pool, sampler, generator, ranks or Ranks()
        self._next: Tensor | None = None  # slots that are drawn already
        self._before: tuple[Tensor, dict[str, Any]] | None = None  # generator and sampler before that draw

    def __call__(self, n: int) -> Tensor:
        """[n] long, slots of the pool."""
        if self.pool.ahead is None:
            return self.sampler(n, self.generator)
        index = self.sampler(n, self.generator) if self._next is None else self._next
        self._before = self.generator.get_state(), self.sampler.state_dict()
        self._next = self.sampler(n, self.generator)
        self.pool.announce(self.ranks.cut(self._next, n))
        return index

    def undo(self) -> None:
        """Take back the early draw."""
        if self._before is not None:
            state, sampler = self._before
            self.generator.set_state(state)
            self.sampler.load_state_dict(sampler)
        self._next = self._before = None
        if self.pool.ahead is not None:
            self.pool.ahead.forget()
