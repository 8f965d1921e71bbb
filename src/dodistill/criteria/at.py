"""`at`: spatial attention of each stage. Zagoruyko and Komodakis, Paying More Attention to Attention (ICLR 2017).

    Q(A) = vec(mean_c A_c^2) / ||vec(mean_c A_c^2)||_2          of a feature map A [C, H, W]
    L_AT = sum over stages of mean ( Q(F) - Q(H) )^2

As in RepDistiller, the mean is over batch and positions.

Deviations, and why
 1. The resolutions that both networks have are compared (`taps.stages`); the released code resizes the larger map
    instead. On VGG, RepDistiller pairs maps of 16, 8, 4 and 4 pixels (`feat[1:-1]`); ours are of 32, 16, 8 and 4.
 2. As in RepDistiller, the maps of ResNet, WRN, VGG and MobileNetV2 are the outputs of their stages. In other networks
    they are the last module's output of each resolution, which may come before a ReLU (see `taps.stages`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..core.batch import Batch
from ..core.context import Context
from .shared.base import Criterion, Labelled, LabelledConfig, paired, probes


def attention(A: Tensor) -> Tensor:
    """Q [B, H W] of feature maps [B, C, H, W]: rows of length 1, >= 0."""
    return nnf.normalize(A.square().mean(1).flatten(1), dim=1)


class AT(Labelled):
    needs = frozenset({"stages"})
    couples = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weight = config.weight

    def own(self, s: Tensor, t: Tensor, batch: Batch) -> dict[str, Tensor]:
        pairs = paired(batch.student, batch.teacher)
        gaps = torch.stack([(attention(F) - attention(H)).square().mean() for F, H in pairs])
        return {"attention": self.weight * gaps.sum()}


@dataclass(frozen=True)
class Config(LabelledConfig):
    name: ClassVar[str] = "at"
    weight: float = 1000.0  #: weight of L_AT

    def build(self, context: Context) -> Criterion:
        paired(*probes(context, AT.needs))
        return AT(self)
