"""How far a network in another format answers as the original does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional.augment import to_float
from .evaluate import agreement

TOLERANCE = 1e-3  #: of an exact format: the largest difference of logits, over the largest logit


@dataclass(frozen=True)
class Parity:
    """Two networks on the same images."""

    difference: float  #: the largest |difference| of their logits
    largest: float  #: the largest |logit| of the original
    same: float  #: % of the images on which both predict the same class
    images: int

    @property
    def exact(self) -> bool:
        """Whether the difference is rounding alone."""
        return self.difference <= TOLERANCE * self.largest  # False for NaN

    def __str__(self) -> str:
        return f"max |difference| of logits {self.difference:.2g} (logits to {self.largest:.3g}), same class on " + (
            f"{self.same:.2f} %"
        )


def parity(original: Tensor, other: Tensor) -> Parity:
    """Of logits [n, K] of both on the same n images."""
    if original.shape != other.shape:
        return Parity(float("inf"), float(original.abs().max()), 0.0, len(original))
    difference = float((original - other).abs().max())
    return Parity(difference, float(original.abs().max()), agreement(other, original), len(original))


@torch.inference_mode()
def answers(run: Callable[[Tensor], Tensor], x: Tensor, batch: int = 32) -> Tensor:
    """Logits fp32 [n, K] of images uint8 [n, C, H, W], on the CPU. The last batch has one image, if there are two."""
    sizes = [batch] * ((len(x) - 1) // batch) + ([(len(x) - 1) % batch] if (len(x) - 1) % batch else []) + [1]
    return torch.cat([run(to_float(part)).float() for part in x.split(sizes)])
