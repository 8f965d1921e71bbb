"""Measures of a classifier: accuracy with labels, agreement with the teacher without; and the distance of its training
images from real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.runtime import at_once
from ..data.images import Images
from ..data.packed import Packed
from ..data.reading import parts
from ..data.rows import Pixels
from ..errors import DodistillError
from ..functional.augment import to_float
from ..functional.memory_format import laid_out
from ..functional.modes import evaluating
from ..models.normalized import logits_of

Autocast = Callable[[], AbstractContextManager[Any]]


def _silent(_done: int, _total: int) -> None:
    return None


@torch.no_grad()
def predict(
    model: nn.Module,
    x_uint8: Pixels,
    batch: int = 1000,
    autocast: Autocast = contextlib.nullcontext,
    progress: Callable[[int, int], None] = _silent,
) -> Tensor:
    """Logits fp32 [n, K], on the model's device, of images uint8 [n, C, H, W], without gradients and in eval mode.

    The model returns them alone, or as `.logits` or ["logits"] of what it returns. `progress(done, n)` is called after
    each batch.
    """
    if len(x_uint8) == 0:
        raise DodistillError("no images to evaluate; give at least one.")
    first = next(model.parameters(), None)
    device = x_uint8.device if first is None else first.device
    with evaluating(model):
        out, done = torch.empty(0), 0
        for part in parts(x_uint8, at_once(device, batch), device):
            with autocast():
                made = model(laid_out(to_float(part)))
            logits = logits_of(made, type(model).__name__)
            if not done:  # one block for all: many small ones between the images' own would scatter the memory
                out = torch.empty(len(x_uint8), *logits.shape[1:], device=logits.device)
            out[done : done + len(part)] = logits
            done += len(part)
            progress(done, len(x_uint8))
    return out


def accuracy(
    model: nn.Module, images: Images | Packed, batch: int = 1000, autocast: Autocast = contextlib.nullcontext
) -> float:
    """Top-1 accuracy in percent. Raises DodistillError for images without labels."""
    if images.y is None:
        raise DodistillError("these images have no labels; accuracy needs them: give labelled images.")
    return top1(predict(model, images.x, batch, autocast), images.y)


def scores(model: nn.Module, images: Images | Packed, teacher: nn.Module | None = None) -> dict[str, Any]:
    """Measures of a classifier on labelled images: `accuracy` in %, `ECE` in [0, 1], `class_shares` of its predictions,
    `images`; with a teacher also `teacher` (its accuracy) and `agreement` in %."""
    if images.y is None:
        raise DodistillError("these images have no labels; accuracy needs them: give labelled images.")
    logits = predict(model, images.x)
    out: dict[str, Any] = {
        "accuracy": top1(logits, images.y), "ECE": expected_calibration_error(logits, images.y),
        "class_shares": class_shares(logits).tolist(), "images": len(images),
    }  # fmt: skip
    if teacher is not None:
        other = predict(teacher, images.x)
        out |= {"teacher": top1(other, images.y), "agreement": agreement(logits, other)}
    return out


def top1(logits: Tensor, y: Tensor) -> float:
    """Share, in percent, of rows of logits [n, K] whose largest entry is at y [n]."""
    return 100 * (logits.argmax(1) == y.to(logits.device)).float().mean().item()


def agreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """Share, in percent, of rows on which two models predict the same class."""
    return top1(logits_a, logits_b.argmax(1))


def class_accuracy(logits: Tensor, y: Tensor) -> list[float | None]:
    """Accuracy in percent of each of the K classes, for logits [n, K] and labels y [n]; None for a class without
    images."""
    y, classes = y.to(logits.device), logits.shape[1]
    images = torch.bincount(y, minlength=classes)
    right = torch.bincount(y[logits.argmax(1) == y], minlength=classes)
    return [round(100 * r / n, 2) if n else None for r, n in zip(right.tolist(), images.tolist())]


def class_shares(logits: Tensor) -> Tensor:
    """Share [K] of each class among the predictions of logits [n, K]; sums to 1."""
    return torch.bincount(logits.argmax(1), minlength=logits.shape[1]).float() / len(logits)


def expected_calibration_error(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over equal bins of confidence, weighted by their share of the rows; in [0, 1].

    Rows that are probabilities already (at least 0, of sum 1) are taken as they are.
    """
    values = logits.float()
    given = bool((values >= 0).all()) and torch.allclose(values.sum(1), values.new_ones(len(values)))
    confidence, named = (values if given else values.softmax(1)).max(1)
    right = (named == y.to(logits.device)).float()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)  # bins are (lo, hi]
    gap = torch.zeros(bins, device=logits.device).index_add_(0, index, right - confidence)
    return (gap.abs().sum() / len(logits)).item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [n, d] and [m, d], each taken as a
    Gaussian of mean m and covariance C (Heusel et al., NeurIPS 2017, eq. 6); >= 0, in float64.

    It falls with the number of rows, so compare sets of one size only. Raises DodistillError for fewer than 2 rows, and
    for features of two widths.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise DodistillError(
            f"features have shapes {tuple(a.shape)} and {tuple(b.shape)}; give two sets [n, d] of the same width d, "
            "of 2 rows or more."
        )
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T).reshape(a.shape[1], -1))
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # of C_a; its product with C_b has the same eigenvalues
    C_b = torch.cov(b.T).reshape(b.shape[1], -1)
    both = torch.linalg.eigvalsh(root @ C_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + values.clamp_min(0).sum() + C_b.trace() - 2 * both
    return max(0.0, float(distance))
