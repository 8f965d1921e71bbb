"""The teacher: any classifier, frozen, and checked once before the run begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import DodistillError, reworded
from ..functional.moments import Moments
from .batchnorm import batchnorms, reached
from .folded import folded
from .normalized import answering
from .patches import attentions, kinds

#: Most values that an image may have.
LARGEST = 1 << 27


class Shared(Protocol):
    """How several processes share the passes of a network, if they do."""

    def through(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """network(x), of which each process computes a part."""

    def whole(self, x: Tensor) -> Tensor:
        """Inner activations [B, ...] of all parts, from those of one."""

    def moments(self, moments: Moments, count: int) -> Moments:
        """Moments of an inner activation over all parts, from those of `count` numbers for each channel of one."""


class Teacher(nn.Module):
    """A frozen classifier of images [B, C, H, W] in [0, 1].

    `model` is any module that gives logits [B, K], alone or as `.logits` or ["logits"] of what it returns; it owns its
    normalisation (`models.Normalized`). It is frozen in place: its parameters get no gradients, and it stays in eval
    mode. The constructor passes two random images through it. Raises DodistillError when it returns no logits, another
    shape, NaN or infinity, probabilities or their logarithms in place of logits, another class count than
    `num_classes`, or does not take `image_shape` (C, H, W).
    """

    model: nn.Module
    num_classes: int
    image_shape: tuple[int, int, int]
    has_batchnorm: bool
    has_attention: bool

    def __init__(self, model: nn.Module, image_shape: tuple[int, int, int], num_classes: int | None = None) -> None:
        super().__init__()
        self.model = model.model if isinstance(model, Teacher) else model
        self.image_shape = require_shape(image_shape)
        self.requires_grad_(False)
        self.train(False)
        #: the BatchNorms that a pass uses: not those of an auxiliary head for training, as Inception has
        self.reached_batchnorms: list[nn.BatchNorm2d | nn.SyncBatchNorm] = []
        self.num_classes = self._probe(num_classes)
        self.has_batchnorm = bool(self.reached_batchnorms)
        self.has_attention = bool(attentions(self.model))
        #: the network of `answers`, made by its first call; in a tuple, so that it is no submodule
        self.answering: tuple[Callable[[Tensor], Tensor], ...] = ()
        self._prepare: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]] | None = None
        self.shared_passes: Shared | None = None  #: set while several processes share its passes

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> logits [B, K] in fp32, whatever autocast is active."""
        return self._logits(x) if self.shared_passes is None else self.shared_passes.through(self._logits, x)

    def _logits(self, x: Tensor) -> Tensor:
        return self._checked(self.model(x), x)

    @torch.no_grad()
    def answers(self, x: Tensor) -> Tensor:
        """The same logits to rounding, without gradients and without hooks, for passes that only label images.

        The first call makes a copy of the model with its BatchNorms folded (`models/folded.py`), where it can.
        The model must not change or move afterwards.
        """
        if not self.answering:
            network = folded(self.model, x[:2]) or self.model
            self.answering = (network if self._prepare is None else self._prepare(network),)
        return self._answers(x) if self.shared_passes is None else self.shared_passes.through(self._answers, x)

    def _answers(self, x: Tensor) -> Tensor:
        return self._checked(self.answering[0](x), x)

    def _checked(self, logits: Tensor, x: Tensor) -> Tensor:
        """The logits in fp32. Raises DodistillError if their shape is not [B, K]: a batch that is answered in part."""
        if logits.shape != (len(x), self.num_classes):
            raise DodistillError(
                f"the teacher returns shape {tuple(logits.shape)} for {len(x)} images, and ({self.num_classes},) for "
                "each of 2; it must treat batches of all sizes alike."
            )
        return logits.float()

    def prepare_answers(self, by: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]] | None) -> None:
        """Replace the network of `answers` by what `by` makes of it, as torch.compile does; None: as it is."""
        self.answering, self._prepare = (), by

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode."""
        super().train(False)
        return self

    def require(self, needs: Iterable[str], method: str, alternatives: Iterable[str]) -> None:
        """Raise DodistillError, naming `alternatives`, if `method` needs what this teacher lacks (see `has`)."""
        reads = {"batchnorm": "the statistics of BatchNorm layers", "attention": "the outputs of attention layers"}
        for need in sorted(needs):
            if not self.has({need}):
                others = ", ".join(sorted(alternatives)) or "none"
                layers = "" if need == "batchnorm" else f", only {kinds(self.model)}"
                raise DodistillError(
                    f"{method!r} reads {reads[need]}, but this teacher ({type(_bare(self.model)).__name__}) has "
                    f"none{layers}. Methods that work with it: {others}."
                )

    def has(self, needs: Iterable[str]) -> bool:
        """Whether this teacher has all of `needs`: `batchnorm`, `attention`."""
        there = {"batchnorm": self.has_batchnorm, "attention": self.has_attention}
        return all(there[need] for need in needs)

    def _probe(self, num_classes: int | None) -> int:
        shape = self.image_shape
        parameter = next(self.model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device

        def refused(reason: str) -> str:
            if parameter is not None and parameter.dtype != torch.float32:
                kind = str(parameter.dtype).removeprefix("torch.")
                said = f"the teacher's weights are {kind}, and images are float32; give teacher.float()."
            else:
                conv = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
                takes = f" Its first convolution takes {conv.in_channels} channel(s)." if conv is not None else ""
                said = (
                    f"the teacher does not take images of shape {shape} (channels, height, width).{takes} "
                    "Give the image_shape that it was trained on."
                )
            return f"{said} The error was: {reason}"

        x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
        with reworded(refused), torch.no_grad(), reached(self.model) as modules:
            out = self.model(x)
        self.reached_batchnorms = [m for m in batchnorms(self.model) if m in modules]
        self.model, out = answering(self.model, out, "the teacher")
        if out.dim() != 2 or out.shape[0] != 2:
            raise DodistillError(
                f"the teacher returns shape {tuple(out.shape)} for 2 images; it must return (2, classes)."
            )
        if not out.is_floating_point():
            raise DodistillError(f"the teacher returns {out.dtype}; logits must be floating point.")
        classes = out.shape[1]
        if num_classes is not None and classes != num_classes:
            raise DodistillError(
                f"the teacher has {classes} classes, but num_classes is {num_classes}; give {classes}."
            )
        if classes < 2:
            raise DodistillError(f"the teacher has {classes} output(s); distillation needs at least 2 classes.")
        if not bool(torch.isfinite(out).all()):
            raise DodistillError(
                "the teacher returns NaN or infinity for random images; check that its weights are loaded and finite."
            )
        if bool((out >= 0).all()) and bool(torch.allclose(out.float().sum(1), torch.ones(2, device=out.device))):
            raise DodistillError(
                "the teacher returns probabilities (rows sum to 1), not logits; remove its final softmax."
            )
        if bool((out <= 0).all()) and bool((out.float().logsumexp(1).abs() < 1e-4).all()):
            raise DodistillError(
                "the teacher returns the logarithms of probabilities (their exponentials sum to 1), not logits; remove "
                "its final log-softmax."
            )
        return classes


def _bare(model: nn.Module) -> nn.Module:
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model


def require_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """`shape` as (C, H, W). Raises DodistillError for anything else, and for images of too many values."""
    given: Any = shape
    if not isinstance(given, Sequence) or len(given) != 3 or not all(isinstance(s, int) and s > 0 for s in given):
        raise DodistillError(f"image_shape is {shape!r}; it must be (channels, height, width), as in (3, 32, 32).")
    c, h, w = shape
    if c * h * w > LARGEST:
        raise DodistillError(f"image_shape is {shape!r}: {c * h * w:,} values an image, more than {LARGEST:,}.")
    return c, h, w
