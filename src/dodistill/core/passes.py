"""The passes of frozen networks, shared out: each process passes its part of a batch that all of them hold.

During an acquisition every process runs the same source with the same random numbers. What costs the time are the
passes of teacher and student. Inside

    with shared_passes(teacher, student, rank, world):
        t = teacher(x)                       # x [n, ...] and t [n, K], the same on every process

each process passes its rows of x through the network, and gets the logits of all. The loss, of whatever form, is then
the same everywhere, and so is its gradient: that of x is put together from the parts. Here every process computes the
same scalar, so the adjoint of putting together is cutting, without a sum (in `collective` it is a sum of scalars).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.moments import Moments
from ..models.teacher import Teacher
from .collective import combined, own_rows, reduced, synchronised


class _Enter(torch.autograd.Function):
    """One's own rows of x; the gradient of x is put together from all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: slice) -> Tensor:
        ctx.rows, ctx.n = rows, len(x)
        return x[rows]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _together(g, ctx.rows, ctx.n), None


class _Leave(torch.autograd.Function):
    """The parts of all processes; of the gradient, which all have, one's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: slice, n: int) -> Tensor:
        ctx.rows = rows
        return _together(x, rows, n)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g[ctx.rows], None, None


def _together(x: Tensor, rows: slice, n: int) -> Tensor:
    out = x.new_zeros(n, *x.shape[1:])
    out[rows] = x
    return reduced(out)


class Passes:
    """Shares the passes of a network; see `models.teacher.Shared`."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._part: tuple[slice, int] | None = None  # of the batch that is on its way through a network: rows, n

    def through(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """network(x) [n, ...] of x [n, ...]. A batch smaller than the group is passed whole, by each process."""
        n = len(x)
        if n < self.world:
            return network(x)
        rows = own_rows(n, self.rank, self.world)
        part: Tensor = _Enter.apply(x, rows)  # type: ignore[no-untyped-call]
        self._part = rows, n
        try:
            return self.whole(network(part))
        finally:
            self._part = None

    def whole(self, x: Tensor) -> Tensor:
        """The activations [n, ...] of all images, from those of this part, inside `through`."""
        if self._part is None:
            return x
        out: Tensor = _Leave.apply(x, *self._part)  # type: ignore[no-untyped-call]
        return out

    def moments(self, moments: Moments, count: int) -> Moments:
        """(mean, biased variance) of an inner activation over all parts, from those of this part, of `count` numbers
        for each channel."""
        if self._part is None:
            return moments
        mean, var = moments
        own = torch.cat([mean.new_tensor([count]), mean, var])[None]
        each: Tensor = _Leave.apply(own, slice(self.rank, self.rank + 1), self.world)  # type: ignore[no-untyped-call]
        return combined(each)[1:]


@contextmanager
def shared_passes(teacher: Teacher, student: nn.Module, rank: int, world: int) -> Iterator[None]:
    """Within the block, the passes of teacher and student are shared out. A student that uses the statistics of its
    batch uses those of the whole batch."""
    passes, inner, own = Passes(rank, world), student.forward, vars(student).get("forward")

    def part(x: Tensor) -> Tensor:
        with synchronised(rank, world):
            out: Tensor = inner(x)
        return out

    teacher.shared_passes = passes
    student.forward = lambda x: passes.through(part, x)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del student.forward
        if own is not None:
            student.forward = own  # type: ignore[method-assign]
        teacher.shared_passes = None
