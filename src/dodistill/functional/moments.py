"""Means and variances of activations whose backward pass is one pass over the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]  #: mean and biased variance, each [C]


def channel_moments(x: Tensor) -> Moments:
    """(mean [C], biased variance [C]) of x [B, C, H, W] over B, H, W, in fp32 or wider; twice differentiable.

    On the CPU several times faster, forward and backward, than `torch.var_mean` over those dimensions.
    """
    mean, var = _ChannelMoments.apply(x)  # type: ignore[no-untyped-call]
    return mean, var


def spatial_mean(x: Tensor) -> Tensor:
    """x [B, C, ...] averaged over all dimensions after C, in fp32 or wider; [B, C]."""
    mean: Tensor = _SpatialMean.apply(x)  # type: ignore[no-untyped-call]
    return mean


def pooled_moments(x: Tensor) -> tuple[Tensor, Moments]:
    """`spatial_mean` and `channel_moments` of x [B, C, H, W] together, still with one pass over x backward."""
    pooled, mean, var = _PooledMoments.apply(x)  # type: ignore[no-untyped-call]
    return pooled, (mean, var)


def _widened(x: Tensor) -> tuple[Tensor, bool]:
    """x in fp32 or wider, and whether that is a copy (which may be overwritten)."""
    low = x.dtype in (torch.bfloat16, torch.float16)
    return (x.float() if low else x), low


def _variance(wide: Tensor, mean: Tensor, copied: bool) -> Tensor:
    """Biased variance [C] around the mean [C]."""
    shift = mean.view(1, -1, 1, 1)
    return (wide.sub_(shift) if copied else wide - shift).square_().mean((0, 2, 3))


class _ChannelMoments(torch.autograd.Function):
    """Autograd's own backward makes four passes: d/dx = g_mean / n + 2 (x - mean) g_var / n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Moments:
        wide, copied = _widened(x)
        mean = wide.mean((0, 2, 3))
        var = _variance(wide, mean, copied)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, g_mean: Tensor, g_var: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        n = x.numel() / x.shape[1]
        slope = 2 * g_var / n
        return torch.addcmul((g_mean / n - slope * mean).view(1, -1, 1, 1), x, slope.view(1, -1, 1, 1)).to(x.dtype)


class _SpatialMean(torch.autograd.Function):
    """The backward pass is one broadcast. Autograd's own mean would first copy it to the full size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.mean(tuple(range(2, x.dim())), dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        shape = ctx.shape
        each: Tensor = (g / shape[2:].numel()).to(ctx.dtype)
        return each.view(*shape[:2], *(1 for _ in shape[2:])).expand(shape)


class _PooledMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide, copied = _widened(x)
        pooled = wide.mean((2, 3))
        mean = pooled.mean(0)
        var = _variance(wide, mean, copied)
        ctx.save_for_backward(x, mean)
        return pooled, mean, var

    @staticmethod
    def backward(ctx: Any, g_pooled: Tensor, g_mean: Tensor, g_var: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        n = x.numel() / x.shape[1]
        slope = 2 * g_var / n
        level = g_pooled * (x.shape[0] / n) + (g_mean / n - slope * mean)
        return torch.addcmul(level[:, :, None, None], x, slope.view(1, -1, 1, 1)).to(x.dtype)
