"""Collective operations that autograd can differentiate, as often as needed, and BatchNorm over several processes.

Each process r has its own scalar O_r, and the gradient is that of their sum, sum_r O_r. For a tensor that every
process reads, it is the sum of the gradients of all O_r. So the adjoint of `gathered` is a sum over processes, cut to
one's own rows, and the adjoint of that is `gathered` again. All processes must call the same operations in the same
order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..functional.moments import channel_moments


class Lost(RuntimeError):
    """A collective operation failed: as a rule, because another process has ended."""


def reduced(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    return _done(lambda: dist.all_reduce(x), x)


def spread(x: Tensor) -> Tensor:
    """The first process' x, in place. Its elements must fill its memory without gaps, in any order."""
    flat = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
    return _done(lambda: dist.broadcast(flat, 0), x) if x.numel() else x


def _done(operation: Callable[[], object], x: Tensor) -> Tensor:
    try:
        operation()
    except RuntimeError as error:
        raise Lost(str(error).partition("\n")[0]) from error
    return x


def own_rows(n: int, rank: int, world: int) -> slice:
    """The rows of a batch of n that a process computes. The parts differ by at most one row."""
    return slice(n * rank // world, n * (rank + 1) // world)


def gathered(x: Tensor, rows: slice, n: int) -> Tensor:
    """The parts x of all processes as one tensor of n rows, in which x are `rows`. Differentiable."""
    out: Tensor = _Gather.apply(x, rows, n)  # type: ignore[no-untyped-call]
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: slice, n: int) -> Tensor:
        ctx.rows, ctx.n = rows, n
        out = x.new_zeros(n, *x.shape[1:])
        out[rows] = x
        return reduced(out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _Cut.apply(g, ctx.rows, ctx.n), None, None  # type: ignore[no-untyped-call]


class _Cut(torch.autograd.Function):
    """Of the sum of g [n, ...] over the processes, one's own rows."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, rows: slice, n: int) -> Tensor:
        ctx.rows, ctx.n = rows, n
        return reduced(g.contiguous().clone())[rows]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:  # type: ignore[override]
        return _Gather.apply(v, ctx.rows, ctx.n), None, None  # type: ignore[no-untyped-call]


def combined(each: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean [C], biased variance [C]) of all parts, from rows of these, [parts, 1 + 2 C] (Chan et al., 1979)."""
    n, (means, variances) = each[:, :1].detach(), each[:, 1:].chunk(2, 1)
    share = n / n.sum()
    mean = (share * means).sum(0)
    return n.sum(), mean, (share * (variances + (means - mean).square())).sum(0)


class synchronised(TorchFunctionMode):
    """Within the block, BatchNorm in train mode has the statistics of the batch of all processes.

    Modules, their types, names and state stay as they are: the mode replaces `torch.nn.functional.batch_norm`. It must
    be the innermost mode, so that no other one replaces the function first.
    """

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = self._norm(*args, **kwargs) if func is nnf.batch_norm else None
        return func(*args, **kwargs) if out is None else out

    # The parameters are those of torch.nn.functional.batch_norm, by name. None: nothing to synchronise.
    def _norm(self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
              weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
              eps: float = 1e-5) -> Tensor | None:  # fmt: skip
        if not training:
            return None
        n, mean, var = self._moments(input)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        out: Tensor = _Scaled.apply(input, scale, shift)  # type: ignore[no-untyped-call]
        return out

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean [C], biased variance [C]) over all processes."""
        if x.dim() == 4:
            mean, var = channel_moments(x)
        else:
            var, mean = torch.var_mean(_wide(x), [d for d in range(x.dim()) if d != 1], correction=0)
        count = mean.new_tensor([x.numel() // x.shape[1]])
        return combined(gathered(torch.cat([count, mean, var])[None], slice(self.rank, self.rank + 1), self.world))


class _Scaled(torch.autograd.Function):
    """x * scale + shift, of x [B, C, ...] and scale, shift [C], in the type of x. It keeps x and no copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.addcmul(_channels(shift, x), _wide(x), _channels(scale, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        wide, dims = _wide(g), [d for d in range(x.dim()) if d != 1]
        return (wide * _channels(scale, x)).to(x.dtype), (wide * _wide(x)).sum(dims), wide.sum(dims)


def _wide(x: Tensor) -> Tensor:
    """In fp32 or wider."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _channels(v: Tensor, like: Tensor) -> Tensor:
    return v.view(1, -1, *(1 for _ in like.shape[2:]))
