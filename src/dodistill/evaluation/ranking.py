"""One set of images on which several students of a teacher are compared without labels.

A run measures the agreement with its teacher on held-back images of its own making, and sources make images of very
different difficulty: the agreements of two runs say little about which student is better. On one set of images for all
students they do (docs/results.md, "Which student is better, without data"). That agreement off the test distribution
goes with accuracy on it is known for pairs of classifiers with data (Baek et al., Agreement-on-the-Line, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional.draws import even
from .evaluate import predict


def evenly(x: Tensor, teacher: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """At most n of the images x [N, C, H, W], at even shares of the teacher's classes, and these classes [n].

    The same for the same images. A rare class gives what there is of it."""
    classes = predict(teacher, x).argmax(1).cpu()
    some = even(classes, n, torch.Generator().manual_seed(0))
    return x[some.to(x.device)], classes[some]


def agrees(student: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """bool [n]: for which of the images x [n, C, H, W] the student predicts the teacher's class, `classes` [n]."""
    return predict(student, x).argmax(1).cpu() == classes


def behind(mine: Tensor, best: Tensor) -> tuple[float, float]:
    """How many points of agreement `mine` bool [n] is behind `best`, and the standard error of this difference.

    The images are the same, so only those count on which one of the two is right."""
    gap = best.float() - mine.float()
    return 100 * float(gap.mean()), 100 * float(gap.std(correction=0)) / len(gap) ** 0.5


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, in [-1, 1]; NaN where one side is constant."""
    u, v = (_ranks(torch.tensor(x, dtype=torch.float64)) for x in (a, b))
    u, v = u - u.mean(), v - v.mean()
    return float((u * v).sum() / (u.square().sum() * v.square().sum()).sqrt())


def _ranks(values: Tensor) -> Tensor:
    """Equal values have their mean rank."""
    _, where, counts = values.unique(return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return middle[where]
