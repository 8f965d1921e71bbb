"""Patch tokens: what the attention layers of a vision transformer put out for each patch of an image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DodistillError

#: Attributes by which attention layers state their number of heads: timm's and PyTorch's, Hugging Face's, others.
_HEADS = ("num_heads", "num_attention_heads", "heads")
#: Names of the projection that joins the heads. Its input holds the heads side by side.
_PROJECTIONS = ("proj", "to_out")


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention layers of `model`, in order of definition: modules that state a number of heads, and contain no
    other that does (a block may state it, too)."""
    stating = [m for m in model.modules() if _heads(m)]
    return [m for m in stating if not any(_heads(inner) for inner in m.modules() if inner is not m)]


def _heads(module: nn.Module) -> int:
    found = (getattr(module, name, None) for name in _HEADS)
    return next((heads for heads in found if isinstance(heads, int) and heads > 0), 0)


def kinds(model: nn.Module) -> str:
    """The kinds of layers in `model`, for an error message."""
    names = sorted({type(m).__name__ for m in model.modules() if next(m.children(), None) is None})
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


class PatchTokens:
    """`layers` holds the patches of the latest forward pass, one [B, G, n, d] per attention layer, in graph, in fp32.

    G windows of n patches each: one window, but in networks that attend within windows (Swin). d is the width of a
    head: the mean over heads of softmax(q k^T) v, before the projection. Where a layer does not show it
    (nn.MultiheadAttention, which projects by a function), d is the width of the layer's output. Class and register
    tokens, which come first, are left out: what remains beside the largest grid of patches, in the shape of the image,
    that the tokens hold; where something remains, timm's `num_prefix_tokens` says how much. Layers whose output is not
    [., N, d], or has a single patch, are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        given = (getattr(m, "num_prefix_tokens", None) for m in model.modules())
        self._prefix: int | None = next((n for n in given if isinstance(n, int)), None)
        self._image: tuple[int, int, int] = (0, 0, 0)  # B, H, W of the latest pass
        self._seen: list[tuple[Tensor, int]] = []  # output of each layer [., N, D], and the heads side by side in D

    def _begin(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen.clear()
        self._image = (len(args[0]), args[0].shape[2], args[0].shape[3])

    def _keep(self, out: Any, heads: int, batch_first: bool = True) -> None:
        out = out[0] if isinstance(out, tuple) and out else out
        if isinstance(out, Tensor) and out.dim() == 3 and out.shape[2] % heads == 0:
            self._seen.append((out if batch_first else out.transpose(0, 1), heads))

    def watch(self, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """A hook that keeps the outputs of an attention layer."""
        heads = _heads(layer)
        projection = next((p for name in _PROJECTIONS if isinstance(p := getattr(layer, name, None), nn.Module)), None)
        if projection is not None:
            return projection.register_forward_pre_hook(lambda _m, args: self._keep(args[0], heads))
        side = heads if isinstance(getattr(layer, "num_attention_heads", None), int) else 1  # HF projects elsewhere
        first = bool(getattr(layer, "batch_first", True))
        return layer.register_forward_hook(lambda _m, _args, out: self._keep(out, side, first))

    def clear(self) -> None:
        """Forget the latest forward pass, and with it its graph."""
        self._seen.clear()

    @property
    def layers(self) -> list[Tensor]:
        found, images = [], self._image[0]
        for out, heads in self._seen:
            if images == 0 or len(out) % images:
                continue
            tokens = out.float().unflatten(2, (heads, -1)).mean(2).unflatten(0, (images, -1))
            patches = tokens[:, :, self._before(tokens.shape[1], tokens.shape[2]) :]
            if patches.shape[2] > 1:
                found.append(patches)
        return found

    def _before(self, windows: int, tokens: int) -> int:
        """How many of the tokens come before the patches."""
        _, height, width = self._image
        columns = math.isqrt(tokens * width // height)
        spare = max(0, tokens - columns * round(columns * height / width))
        if windows > 1 or not spare:
            return 0
        return spare if self._prefix is None else self._prefix


@contextmanager
def patch_tokens(model: nn.Module) -> Iterator[PatchTokens]:
    """Record the patch tokens of each forward pass of `model`, of images [B, C, H, W], within the block."""
    taps = PatchTokens(model)
    with ExitStack() as stack:
        stack.callback(taps.clear)
        stack.callback(model.register_forward_pre_hook(taps._begin).remove)
        for layer in attentions(model):
            stack.callback(taps.watch(layer).remove)
        yield taps


def require_patches(model: nn.Module, image_shape: tuple[int, int, int], method: str, device: torch.device) -> None:
    """Raise DodistillError, which names the layers of `model`, where no attention layer puts out patches."""
    grey = torch.full((2, *image_shape), 0.5, device=device, requires_grad=True)  # gradients: no fused encoder layer
    with patch_tokens(model) as taps:
        model(grey)
        if not taps.layers:
            raise DodistillError(
                f"{method!r} compares patches of an image by what attention layers put out for them, [B, patches, d], "
                f"but no layer of this teacher does. Its layers: {kinds(model)}. Use --source procedural, or another "
                "source that needs neither attention nor BatchNorm (dodistill methods)."
            )
