"""`sp`: similarities within a batch. Tung and Mori, Similarity-Preserving Knowledge Distillation (ICCV 2019).

    G    = vec(A) vec(A)^T, each row divided by its length            [B, B], of the coarsest feature maps A
    L_SP = (1 / B^2) || G_student - G_teacher ||_F^2

The maps can differ in size. As in RepDistiller, they are those of the last stage of each network (`taps.stages`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as nnf
from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from ..errors import DodistillError
from .shared.base import Criterion, Labelled, LabelledConfig, probes


def similarity(A: Tensor) -> Tensor:
    """G [B, B] of feature maps [B, ...], rows of length 1."""
    flat = A.flatten(1)
    return nnf.normalize(flat @ flat.T, dim=1)


class SP(Labelled):
    needs = frozenset({"stages"})
    couples = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weight = config.weight

    def own(self, s: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        F, H = batch.student.stages[-1].float(), batch.teacher.stages[-1].float()
        return {"similarity": self.weight * (similarity(F) - similarity(H)).square().mean()}


@dataclass(frozen=True)
class Config(LabelledConfig):
    name: ClassVar[str] = "sp"
    weight: float = 3000.0  #: weight of L_SP

    def build(self, context: Context) -> Criterion:
        if not all(seen.stages for seen in probes(context, SP.needs)):
            raise DodistillError(
                "criterion sp compares feature maps; student or teacher has none (4-D outputs). Use kl."
            )
        return SP(self)
