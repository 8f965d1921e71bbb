"""Inner activations of any network, by hooks that exist only within a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import DodistillError
from ..functional.modes import evaluating
from ..functional.moments import Moments, channel_moments, pooled_moments, spatial_mean
from .batchnorm import batchnorms


@contextmanager
def _hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks at the end of the block."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared(model: nn.Module) -> Any:
    """How several processes share the passes of a teacher (`teacher.Shared`); None for others, and without sharing."""
    return getattr(model, "shared_passes", None)


def _used(model: nn.Module) -> list[nn.BatchNorm2d | nn.SyncBatchNorm]:
    """The BatchNorms that a pass of a `Teacher` reaches; those of any other module."""
    used: list[nn.BatchNorm2d | nn.SyncBatchNorm] | None = getattr(model, "reached_batchnorms", None)
    return batchnorms(model) if used is None else used


class BatchNormInputs(Sequence[Moments]):
    """Per layer of `modules`: (mean [C], biased variance [C]) of its input in the latest forward; fp32, in graph."""

    def __init__(self, modules: list[nn.BatchNorm2d | nn.SyncBatchNorm], shared: Any = None) -> None:
        """`shared`: how several processes share the passes of the network; see `teacher.Shared`."""
        self.modules, self.shared = modules, shared
        self._moments: dict[int, Moments] = {}

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        self._moments[id(module)] = self._over_all(channel_moments(x), x)

    def _over_all(self, moments: Moments, x: Tensor) -> Moments:
        return moments if self.shared is None else self.shared.moments(moments, x.numel() // x.shape[1])

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
            raise DodistillError(
                f"{module} has no input yet: there was no forward pass in this block, or it does not use the layer."
            )
        return self._moments[id(module)]


@contextmanager
def batchnorm_inputs(model: nn.Module) -> Iterator[BatchNormInputs]:
    """Record the input moments of every BatchNorm2d that `model` uses, within the block."""
    taps = BatchNormInputs(_used(model), _shared(model))
    with _hooked(m.register_forward_pre_hook(taps._record) for m in taps.modules):
        try:
            yield taps
        finally:
            taps.clear()


@dataclass
class Features:
    """The features of the latest forward pass, from `tapped`."""

    penultimate: Tensor | None = None  #: [B, d], the input of the classifier
    stages: list[Tensor] = field(default_factory=list)  #: [B, C, H, W], one per resolution, the finest first


@contextmanager
def tapped(model: nn.Module, needs: frozenset[str]) -> Iterator[Features]:
    """Record the features that `needs` names, of each forward pass of `model` in this block: `features` (the
    penultimate ones), `stages` (see `stages`)."""
    seen = Features()
    if not needs:
        yield seen
        return
    with ExitStack() as stack:
        tap = stack.enter_context(penultimate(model)) if "features" in needs else None
        maps = stack.enter_context(stages(model)) if "stages" in needs else {}

        def gather(*_: Any) -> None:
            seen.penultimate = None if tap is None else tap.value
            seen.stages = [maps[size] for size in sorted(maps, reverse=True)]

        stack.callback(model.register_forward_hook(gather).remove)
        yield seen


def probe(model: nn.Module, image_shape: tuple[int, int, int], needs: frozenset[str], device: torch.device) -> Features:
    """The features of two grey images, in eval mode and without gradients: for widths and resolutions."""
    with evaluating(model), torch.no_grad(), tapped(model, needs) as seen:
        model(torch.full((2, *image_shape), 0.5, device=device))
    return seen


def _stage_modules(model: nn.Module) -> list[nn.Module]:
    """The submodules whose outputs can be the maps of stages."""
    for net in model.modules():  # the network itself, or one in a wrapper
        names: Sequence[str] = getattr(net, "stage_names", ())
        if names:
            there = dict(net.named_modules())
            if missing := [name for name in names if name not in there]:
                raise DodistillError(f"stage_names of {type(net).__name__} has {missing[0]!r}, which is no submodule.")
            return [there[name] for name in names]
    return [m for m in model.modules() if m is not model]


@contextmanager
def stages(model: nn.Module) -> Iterator[dict[tuple[int, int], Tensor]]:
    """(H, W) -> the last feature map [B, C, H, W] of that size in the latest forward pass, in graph; 1x1 is left out.

    Only outputs of submodules are recorded, not those of functions. A network can name the submodules: `stage_names`,
    a tuple of their names, which WRN and MobileNetV2 have. In other networks all submodules count. Where stages end in
    modules (ResNet, VGG), the maps are then the outputs of the stages. Where ReLU and pooling are functions (Tiny),
    they are the last maps before these, which may be negative. Where the next unit begins at the old size, they are its
    first map. A network whose maps do not shrink (a ViT) has no stages. An output that has not the proportions of the
    image is no feature map, such as [B, H, W, C] in a ConvNeXt.

    Raises DodistillError where `stage_names` has a name that is no submodule.
    """
    found: dict[tuple[int, int], Tensor] = {}
    image = [1, 1]

    def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.clear()
        image[:] = args[0].shape[2:]

    def record(_module: nn.Module, _args: Any, out: Any) -> None:
        if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[2] * out.shape[3] == 1:
            return
        (h, w), (height, width) = out.shape[2:], image
        if abs(h * width - w * height) <= max(height, width):  # up to a pixel of rounding in h and w
            found[(h, w)] = out

    handles = [m.register_forward_hook(record) for m in _stage_modules(model)]
    handles.append(model.register_forward_pre_hook(begin))
    with _hooked(handles):
        try:
            yield found
        finally:
            found.clear()


class Penultimate:
    """`value` [B, D] (or the shape of the layer's input): the input of the classifier in the latest forward pass."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, shared: Any = None) -> None:
        self.layer, self.shared = layer, shared
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        if self._value is None:
            raise DodistillError("no features yet: run the model inside the `with penultimate(model)` block first.")
        return self._value

    def _record(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        x = x.mean((2, 3)) if isinstance(self.layer, nn.Conv2d) else x
        self._value = x if self.shared is None else self.shared.whole(x)


def classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The last Linear of `model` and its name; without one, the last 1x1 convolution.

    Raises DodistillError for a model that has neither.
    """
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    if not linears and not convs:
        raise DodistillError(
            "this model has no Linear layer and no 1x1 convolution, so it has no penultimate features."
        )
    return linears[-1] if linears else convs[-1]


@contextmanager
def penultimate(model: nn.Module) -> Iterator[Penultimate]:
    """Record the input of the `classifier` of `model` within the block (averaged over space for a convolution)."""
    tap = Penultimate(classifier(model)[1], _shared(model))
    with _hooked([tap.layer.register_forward_pre_hook(tap._record)]):
        yield tap


class PooledInputs(BatchNormInputs):
    """`BatchNormInputs`, and `features`: the inputs of `layers`, image by image."""

    def __init__(
        self, norms: list[nn.BatchNorm2d | nn.SyncBatchNorm], layers: Sequence[nn.Module], shared: Any = None
    ) -> None:
        super().__init__(norms, shared)
        self.layers = list(layers)
        self._means: dict[int, Tensor] = {}

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if not any(module is m for m in self.layers):
            self._moments[id(module)] = self._over_all(channel_moments(x), x)
            return
        if any(module is m for m in self.modules):
            means, moments = pooled_moments(x)
            self._moments[id(module)] = self._over_all(moments, x)
        else:
            means = spatial_mean(x) if x.dim() > 2 else x
        self._means[id(module)] = means if self.shared is None else self.shared.whole(means)

    def clear(self) -> None:
        super().clear()
        self._means.clear()

    @property
    def features(self) -> Tensor:
        """[B, D]: per layer and channel its input in the latest forward, averaged over space; fp32, in graph."""
        unseen = [m for m in self.layers if id(m) not in self._means]
        if unseen:
            raise DodistillError(
                f"{type(unseen[0]).__name__} has no input yet: there was no forward pass, or it does not use the layer."
            )
        return torch.cat([self._means[id(m)] for m in self.layers], 1)


@contextmanager
def pooled_inputs(model: nn.Module, layers: Sequence[nn.Module] = (), moments: bool = True) -> Iterator[PooledInputs]:
    """Record the inputs of `layers` (empty: every BatchNorm2d that `model` uses), averaged over space, in the block.

    With `moments`, also the statistics of `batchnorm_inputs`, in the same pass over the activations.
    """
    norms = _used(model)
    taps = PooledInputs(norms if moments else [], layers or norms, _shared(model))
    with _hooked(m.register_forward_pre_hook(taps._record) for m in dict.fromkeys([*taps.modules, *taps.layers])):
        try:
            yield taps
        finally:
            taps.clear()
