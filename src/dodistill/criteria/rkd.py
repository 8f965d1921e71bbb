"""`rkd`: distances and angles between a batch's features. Park et al., Relational Knowledge Distillation (CVPR 2019).

    psi_D(i, j)    = || f_i - f_j || / (mean of these over all pairs)
    psi_A(i, j, k) = cos of the angle at f_j between f_i and f_k
    L_RKD          = distance * huber(psi_D) + angle * huber(psi_A)     between student and teacher, means

Features are the penultimate ones. The angles need B^3 numbers and B^2 d differences, so use batches of 64 to 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from .shared.base import Criterion, Labelled, LabelledConfig, both, widths


def distances(f: Tensor) -> Tensor:
    """psi_D [B, B] of features [B, d]; 0 on the diagonal, mean 1 off it."""
    size = f.square().sum(1)
    gap = (size[:, None] + size - 2 * f @ f.T).clamp_min(1e-12).sqrt()
    gap = gap.masked_fill(torch.eye(len(f), dtype=torch.bool, device=f.device), 0.0)
    return gap * (len(f) * (len(f) - 1) / gap.sum())


def angles(f: Tensor) -> Tensor:
    """psi_A [B, B, B] of features [B, d], the vertex first: cosines in [-1, 1], 0 where two of the three are one."""
    way = f - f[:, None]  # [j, i, d], from j to i
    # A length of 0 has no second derivative, and some updates need one. Such pairs are masked before and after.
    none = way.detach().square().sum(2, keepdim=True) < 1e-20
    way = nnf.normalize(way.masked_fill(none, 1.0), dim=2).masked_fill(none, 0.0)
    return way @ way.mT


class RKD(Labelled):
    needs = frozenset({"features"})
    couples = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def own(self, s: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        c, (f, h) = self.config, both(batch.student, batch.teacher)
        return {
            "distance": c.weight * c.distance * nnf.smooth_l1_loss(distances(f), distances(h)),
            "angle": c.weight * c.angle * nnf.smooth_l1_loss(angles(f), angles(h)),
        }


@dataclass(frozen=True)
class Config(LabelledConfig):
    name: ClassVar[str] = "rkd"
    weight: float = 1.0  #: weight of L_RKD
    distance: float = 25.0  #: weight of the distances, within L_RKD
    angle: float = 50.0  #: weight of the angles, within L_RKD

    def build(self, context: Context) -> Criterion:
        widths(context)
        return RKD(self)
