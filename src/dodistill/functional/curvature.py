"""Cheap second derivatives: convolution and BatchNorm whose gradients can be differentiated at the cost of their
arithmetic.

Autograd can differentiate a gradient already. But it computes the weight gradient of a convolution as a convolution
whose kernel is the whole map, and BatchNorm's second derivative as about thirty passes over the activations. A product
with the Hessian then costs 6 times a gradient, where 2 times would suffice. Inside

    with second_derivatives():
        loss = ...                       # F.conv2d and F.batch_norm (train mode, NCHW) of any network

both functions have the same values and running statistics; only their derivatives are computed differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
#: stride, padding, dilation, transposed, its output padding, groups
Conf = tuple[list[int], list[int], list[int], bool, list[int], int]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, conf: Conf) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.conf, ctx.mask = conf, list(ctx.needs_input_grad[:3])
        out: Tensor = _aten.convolution(x, w, b, *conf)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return *_ConvGradients.apply(g, x, w, ctx.conf, ctx.mask), None  # type: ignore[no-untyped-call]


class _ConvGradients(torch.autograd.Function):
    """(dx, dw, db) from the gradient g of a convolution's output; bilinear in (g, w), (g, x) and linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, conf: Conf, mask: list[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.conf = conf
        ctx.set_materialize_grads(False)
        return _aten.convolution_backward(g, x, w, [w.shape[0]], *conf, mask)

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Any:  # type: ignore[override]
        g, x, w = ctx.saved_tensors
        stride, padding, dilation, _, _, groups = ctx.conf
        to_g, to_x, to_w = None, None, None
        if vx is not None:
            to_g = nnf.conv2d(vx, w, None, stride, padding, dilation, groups)
            to_w = _aten.convolution_backward(g, vx, w, None, *ctx.conf, [False, True, False])[1]
        if vw is not None:
            part = nnf.conv2d(x, vw, vb, stride, padding, dilation, groups)
            to_g = part if to_g is None else to_g.add_(part)
            if ctx.needs_input_grad[1]:
                to_x = _aten.convolution_backward(g, x, vw, None, *ctx.conf, [True, False, False])[0]
        elif vb is not None:
            part = vb.view(1, -1, 1, 1).expand_as(g)
            to_g = part if to_g is None else to_g + part
        return to_g, to_x, to_w, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, mean: Any, var: Any, momentum: float, eps: float) -> Tensor:
        out: Tensor
        out, mu, r = _aten.native_batch_norm(x, w, b, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, w, mu, r)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w, mu, r = ctx.saved_tensors
        return *_NormGradients.apply(g, x, w, mu, r, ctx.eps), None, None, None, None  # type: ignore[no-untyped-call]


class _NormGradients(torch.autograd.Function):
    """(dx, dw, db) from the gradient g of BatchNorm's output y = w u + b, u = (x - mu) r, with means over N per
    channel:

        dx = w r (g - a - c u),    dw = N c,    db = N a,    a = mean g,    c = mean g u
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mu: Tensor, r: Tensor, eps: float) -> Any:
        dx, dw, db = _aten.native_batch_norm_backward(g, x, w, None, None, mu, r, True, eps, [True, True, True])
        ctx.save_for_backward(g, x, w, mu, r, dw, db)
        return dx, dw, db

    @staticmethod
    def backward(ctx: Any, v: Tensor, p: Tensor, q: Tensor) -> Any:  # type: ignore[override]
        """The gradient of S = <v, dx> + <p, dw> + <q, db>, by three reductions and two sums of three terms.

        With m = mean v, d = mean v u, s = w r, E = sum v (g - a - c u):  S = s E + <p, dw> + <q, db>, so
        dS/dg = s (v - m - d u) + p u + q, dS/dw = r E, and dS/du = h = -s (d g + c v) + p g. x acts through u and r:
        dS/dx = r (h - mean h - u mean(h u)) - w E r^2 u / N.
        """
        g, x, w, mu, r, dw, db = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        G, V, U = _rows(g), _rows(v), (_rows(x) - mu).mul_(r)
        a, c, s = db / n, dw / n, w * r
        m, d = V.mean(0), (V * U).mean(0)
        E = (V * G).sum(0) - n * (m * a + d * c)
        to_g = torch.addcmul(q - s * m, U, p - s * d).addcmul_(V, s)
        mean_h, mean_hu = p * a - s * (d * a + c * m), p * c - 2 * s * d * c
        to_x = U.mul_(-r * mean_hu - w * E * r * r / n).sub_(r * mean_h)  # in U's place
        to_x.addcmul_(G, r * (p - s * d)).addcmul_(V, -r * s * c)
        return _maps(to_g, g), _maps(to_x, x), r * E, None, None, None


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B H W, C], at least fp32; no copy where the channels lie last in memory."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    b, c, h, w = like.shape
    return rows.view(b, h, w, c).permute(0, 3, 1, 2).to(like.dtype)


# The parameters are those of torch.nn.functional, by name. None: this file does not handle the case.
def _conv(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> Tensor | None:  # fmt: skip
    if input.dim() != 4 or isinstance(padding, str):
        return None
    tensors: tuple[Tensor | None, ...] = (input, weight, bias)
    if torch.is_autocast_enabled(input.device.type):
        low = torch.get_autocast_dtype(input.device.type)
        tensors = tuple(t if t is None else t.to(low) for t in tensors)
    conf = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
    out: Tensor = _Conv.apply(*tensors, conf)  # type: ignore[no-untyped-call]
    return out


def _norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
          bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
          eps: float = 1e-5) -> Tensor | None:  # fmt: skip
    if not training or input.dim() != 4 or weight is None or bias is None:
        return None
    out: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, running_mean, running_var, momentum, eps
    )
    return out


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


_OWN: dict[Callable[..., Any], Callable[..., Tensor | None]] = {nnf.conv2d: _conv, nnf.batch_norm: _norm}


class second_derivatives(TorchFunctionMode):
    """Within the block, second derivatives cost less; see the head of this file."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = _OWN.get(func)
        out = own(*args, **(kwargs or {})) if own is not None else None
        return func(*args, **(kwargs or {})) if out is None else out
