"""What a network computes inside, by hooks that exist only within a `with` block. Works on any nn.Module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from .errors import DodistillError

Moments = tuple[Tensor, Tensor]


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d | nn.SyncBatchNorm]:
    """The BatchNorm layers of `model` that keep running statistics, in order of definition."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]


class _ChannelMoments(torch.autograd.Function):
    """One pass over x backward instead of autograd's four: d/dx = g_mean / n + 2 (x - mean) g_var / n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Moments:
        low = x.dtype in (torch.bfloat16, torch.float16)
        wide = x.float() if low else x  # a copy where it converts, which may then be overwritten
        mean = wide.mean((0, 2, 3))
        shift = mean.view(1, -1, 1, 1)
        var = (wide.sub_(shift) if low else wide - shift).square_().mean((0, 2, 3))
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, g_mean: Tensor, g_var: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        n = x.numel() / x.shape[1]
        slope = 2 * g_var / n
        return torch.addcmul((g_mean / n - slope * mean).view(1, -1, 1, 1), x, slope.view(1, -1, 1, 1)).to(x.dtype)


def channel_moments(x: Tensor) -> Moments:
    """(mean [C], biased variance [C]) of x [B, C, H, W] over B, H, W, in fp32 at least; twice differentiable.

    On the CPU several times faster, forward and backward, than `torch.var_mean` over those dimensions.
    """
    mean, var = _ChannelMoments.apply(x)  # type: ignore[no-untyped-call]
    return mean, var


class BatchNormInputs(Sequence[Moments]):
    """Per layer of `modules`: (mean [C], biased variance [C]) of its input in the latest forward; fp32, in graph."""

    def __init__(self, modules: list[nn.BatchNorm2d | nn.SyncBatchNorm]) -> None:
        self.modules = modules
        self._moments: dict[int, Moments] = {}

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._moments[id(module)] = channel_moments(args[0])

    def clear(self) -> None:
        """Forget the latest forward pass, and with it its graph."""
        self._moments.clear()

    def __len__(self) -> int:
        return len(self.modules)

    @overload
    def __getitem__(self, index: int) -> Moments: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Moments]: ...
    def __getitem__(self, index: int | slice) -> Moments | Sequence[Moments]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        module = self.modules[index]
        if id(module) not in self._moments:
            raise DodistillError(f"{module} has seen no input: no forward pass in this block, or it is not used in it.")
        return self._moments[id(module)]


@contextmanager
def batchnorm_inputs(model: nn.Module) -> Iterator[BatchNormInputs]:
    """Tap the input of every BatchNorm2d of `model` while the block lasts."""
    taps = BatchNormInputs(batchnorms(model))
    handles = [m.register_forward_pre_hook(taps._record) for m in taps.modules]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
        taps.clear()


class Penultimate:
    """`value` [B, D] (or the shape that the layer gets): what entered the classifier in the latest forward pass."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        if self._value is None:
            raise DodistillError("no features yet: run the model inside the `with penultimate(model)` block first.")
        return self._value

    def _record(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        self._value = x.mean((2, 3)) if isinstance(self.layer, nn.Conv2d) else x


@contextmanager
def penultimate(model: nn.Module) -> Iterator[Penultimate]:
    """Tap the input of the last Linear of `model` (without one: of its last 1x1 convolution, averaged over space).

    Raises DodistillError for a model that has neither.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    if not linears and not convs:
        raise DodistillError(
            "this model has no Linear layer and no 1x1 convolution, so it has no penultimate features."
        )
    tap = Penultimate(linears[-1] if linears else convs[-1])
    handle = tap.layer.register_forward_pre_hook(tap._record)
    try:
        yield tap
    finally:
        handle.remove()
