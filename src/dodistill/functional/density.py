"""The entropy of a kernel density, without keeping the kernels of all pairs for the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _KernelSums(torch.autograd.Function):
    """sum_j w_j exp(-(x_k - s_j)^2 / 2 h^2), [B, m] -> [B, K], at points x [K] with weights w [m].

    The backward pass computes the kernels again, one point at a time: it is several times faster than autograd on
    [B, K, m], and needs no memory for it.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, x: Tensor, w: Tensor, h: float) -> Tensor:
        ctx.save_for_backward(s, x, w)
        ctx.h = h
        return torch.stack([_kernel(s - x[k], h) @ w for k in range(len(x))], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        s, x, w = ctx.saved_tensors
        out = torch.zeros_like(s)
        for k in range(len(x)):
            d = s - x[k]
            out.sub_(_kernel(d, ctx.h).mul_(d).mul_(grads[0][:, k : k + 1]))
        return out.mul_(w / ctx.h**2), None, None, None


def _kernel(d: Tensor, h: float) -> Tensor:
    return (d * d).mul_(-1 / (2 * h * h)).exp_()


def kernel_entropy(
    s: Tensor, bandwidth: float = 0.01, points: int = 10, weights: Tensor | None = None, floor: float = 1e-4
) -> Tensor:
    """Differential entropy, in nats, of the Gaussian kernel density of s [B, m]: the mean over B.

    Args:
        s: samples; the gradient goes to them, once differentiable.
        bandwidth: the kernel's standard deviation.
        points: the integral of -p log p is by trapezoids between so many points, from the least to the greatest value
            of the whole batch. No gradient passes through the points.
        weights: [m], how many samples each column stands for; default 1.
        floor: added to the density.
    """
    w = torch.ones_like(s[0]) if weights is None else weights.to(s.dtype)
    low, high = s.detach().amin(), s.detach().amax()
    x = low + (high - low) * torch.linspace(0, 1, points, device=s.device, dtype=s.dtype)
    sums: Tensor = _KernelSums.apply(s, x, w, bandwidth)  # type: ignore[no-untyped-call]
    p = sums / (w.sum() * bandwidth * math.sqrt(2 * math.pi)) + floor
    return torch.trapezoid(-p * p.log(), x, dim=1).mean()
